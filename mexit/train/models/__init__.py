"""The networks, by the name typed after `--model`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mexit.core.manifest import InputSpec, PrepareSpec
from mexit.errors import UsageError
from mexit.train.models import digits_cnn, small_cnn
from mexit.train.models.multi_exit import MultiExit, Stage

__all__ = ["PRESETS", "MultiExit", "Preset", "Stage", "build", "preset"]


@dataclass(frozen=True)
class Preset:
    """A network before it knows its classes: how to build it, its input, its exits, how images are prepared."""

    build: Callable[[int], MultiExit]
    input_shape: tuple[int, int, int]
    exits: int
    prepare: PrepareSpec

    @property
    def input(self) -> InputSpec:
        """The input tensor and the preparation of images for it."""
        channels, height, width = self.input_shape
        return InputSpec(
            name="input",
            dtype="float32",
            layout="NCHW",
            channels=channels,
            size=(height, width),
            range=(0.0, 1.0),
            prepare=self.prepare,
        )


PRESETS = {
    "digits-cnn": Preset(digits_cnn.build, digits_cnn.INPUT_SHAPE, 3, PrepareSpec(resize="box")),
    "small-cnn": Preset(small_cnn.build, small_cnn.INPUT_SHAPE, 3, PrepareSpec()),
}


def preset(name: str) -> Preset:
    """Look a network up. Raises `UsageError` naming those that exist."""
    if name not in PRESETS:
        raise UsageError(f"unknown model '{name}': choose from {', '.join(PRESETS)}")
    return PRESETS[name]


def build(name: str, classes: int) -> MultiExit:
    """A freshly initialised network."""
    return preset(name).build(classes)
