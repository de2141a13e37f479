"""The networks, by the name typed after `--model`.

Every network has a `-single` twin: the same backbone with its last exit only, the defended baseline that a
multi-exit network is measured against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from mexit.core.manifest import InputSpec, PrepareSpec
from mexit.errors import UsageError
from mexit.models import digits_cnn, mobilenetv2, msdnet, resnet, small_cnn
from mexit.models.chain import single_exit
from mexit.models.msdnet import MSDNetConfig
from mexit.models.multi_exit import MultiExit, Stage

__all__ = ["PRESETS", "MultiExit", "Preset", "Stage", "build", "preset"]


@dataclass(frozen=True)
class Preset:
    """A network before it knows its classes: how to build it, its input, its exits, how images are prepared.

    Attributes:
        classes: of the data set it was published for; `build` takes any number.
    """

    build: Callable[[int], MultiExit]
    input_shape: tuple[int, int, int]
    exits: int
    prepare: PrepareSpec
    classes: int = 10

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


# NEO-KD names the backbone and the number of exits; for CIFAR-10 these are the layers whose costs fit the two
# costs it reports, for CIFAR-100 and ImageNet those of the authors' earlier work, for Tiny-ImageNet our choice:
# four scales, because the classifier needs a coarsest scale of 5 to 12 pixels.
MSDNET_CIFAR10 = MSDNetConfig(
    blocks=3, base=2, step=2, mean=(0.4914, 0.4824, 0.4467), std=(0.2471, 0.2435, 0.2616)
)
MSDNET_CIFAR100 = MSDNetConfig(
    blocks=7, base=4, step=2, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)
)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MSDNET_TINY_IMAGENET = MSDNetConfig(
    blocks=5, base=4, step=2, growth_factors=(1, 2, 4, 4), bottleneck_factors=(1, 2, 4, 4),
    input_shape=(3, 64, 64), mean=_IMAGENET_MEAN, std=_IMAGENET_STD,
)  # fmt: skip
MSDNET_IMAGENET = MSDNetConfig(
    blocks=5, base=4, step=4, channels=32, growth=16, growth_factors=(1, 2, 4, 4), bottleneck_factors=(1, 2, 4, 4),
    stem=4, head_width=None, input_shape=(3, 224, 224), mean=_IMAGENET_MEAN, std=_IMAGENET_STD,
)  # fmt: skip


def _msdnet(config: MSDNetConfig, classes: int, prepare: PrepareSpec) -> Preset:
    return Preset(partial(msdnet.build, config), config.input_shape, config.blocks, prepare, classes)


def _build_single(whole: Callable[[int], MultiExit], classes: int) -> MultiExit:
    return single_exit(whole(classes))


_MULTI_EXIT = {
    "digits-cnn": Preset(digits_cnn.build, digits_cnn.INPUT_SHAPE, 3, PrepareSpec(resize="box")),
    "small-cnn": Preset(small_cnn.build, small_cnn.INPUT_SHAPE, 3, PrepareSpec()),
    "msdnet-cifar10": _msdnet(MSDNET_CIFAR10, 10, PrepareSpec()),
    "msdnet-cifar100": _msdnet(MSDNET_CIFAR100, 100, PrepareSpec()),
    "msdnet-tiny-imagenet": _msdnet(MSDNET_TINY_IMAGENET, 200, PrepareSpec(fit="cover")),
    # The usual view of ImageNet: the middle 224 pixels of a picture scaled to 256.
    "msdnet-imagenet": _msdnet(MSDNET_IMAGENET, 1000, PrepareSpec(fit="cover", crop=224 / 256)),
    "resnet38": Preset(resnet.build, resnet.INPUT_SHAPE, resnet.EXITS, PrepareSpec()),
    "mobilenetv2": Preset(mobilenetv2.build, mobilenetv2.INPUT_SHAPE, mobilenetv2.EXITS, PrepareSpec()),
}
PRESETS: dict[str, Preset] = {}
for _name, _found in _MULTI_EXIT.items():
    PRESETS[_name] = _found
    PRESETS[f"{_name}-single"] = replace(_found, build=partial(_build_single, _found.build), exits=1)


def preset(name: str) -> Preset:
    """Look a network up. Raises `UsageError` naming those that exist."""
    if name not in PRESETS:
        raise UsageError(f"unknown model '{name}': choose from {', '.join(PRESETS)}")
    return PRESETS[name]


def build(name: str, classes: int) -> MultiExit:
    """A freshly initialised network."""
    return preset(name).build(classes)
