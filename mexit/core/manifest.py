"""The manifest `bundle.json`: which files, tensors, costs and data a bundle has.

`docs/bundle-format.md` is the specification. The frozen dataclasses mirror the file field by field.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mexit.core.cost import Costs
from mexit.core.printable import UNPRINTABLE
from mexit.core.schema import check_format, decode
from mexit.errors import Damaged

FORMAT = "mexit-bundle"
VERSION = 2
_PREPARE_CHOICES = {
    "resize": ("bilinear", "bicubic", "box"),
    "fit": ("stretch", "cover", "contain"),
    "grey": ("luma",),
    "alpha": ("black", "white"),
}
MAX_SIDE = 4096  # pixels of an input
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class PrepareSpec:
    """How `data.preprocess` converts an image to the input tensor.

    Attributes:
        resize: antialiased Pillow filter, "bilinear", "bicubic" or "box".
        fit: "stretch", "cover" (scale and crop) or "contain" (scale and pad with black).
        crop: fraction of each side to keep around the centre, before fitting, in (0, 1].
        grey: conversion for inputs with one channel, "luma" (ITU-R 601).
        alpha: colour behind transparent pixels, "black" or "white".
        exif: whether to apply the orientation tag of a photograph.
        grey_bits: bits of a grey value in 16-bit files that do not declare their range, 9 to 16; None = 16.
    """

    resize: str = "bilinear"
    fit: str = "stretch"
    crop: float = 1.0
    grey: str = "luma"
    alpha: str = "black"
    exif: bool = True
    grey_bits: int | None = None

    def __post_init__(self) -> None:
        for name, choices in _PREPARE_CHOICES.items():
            if getattr(self, name) not in choices:
                raise Damaged(f"prepare.{name} must be one of {', '.join(choices)}, found {getattr(self, name)!r}")
        if self.grey_bits is not None and not 9 <= self.grey_bits <= 16:
            raise Damaged(f"prepare.grey_bits must lie in 9 to 16, found {self.grey_bits}")
        if not 0 < self.crop <= 1:
            raise Damaged(f"prepare.crop must lie in (0, 1], found {self.crop}")


@dataclass(frozen=True)
class InputSpec:
    """The input tensor; `size` is (H, W), `range` the smallest and largest pixel value."""

    name: str
    dtype: str
    layout: str
    channels: int
    size: tuple[int, int]
    range: tuple[float, float]
    prepare: PrepareSpec

    def __post_init__(self) -> None:
        fixed = (self.dtype, self.layout, self.range)
        if fixed != ("float32", "NCHW", (0.0, 1.0)):
            raise Damaged(f"input must be float32 NCHW in [0, 1], found {fixed}")
        if self.channels not in (1, 3) or not all(0 < side <= MAX_SIDE for side in self.size):
            raise Damaged(f"input must have 1 or 3 channels and 1 to {MAX_SIDE} pixels per side, found {self.shape}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, H, W)."""
        return (self.channels, *self.size)


@dataclass(frozen=True)
class ExitSpec:
    """Cost of one exit.

    Attributes:
        trunk_macs: MACs of the segment's layers that later exits need too.
        head_macs: MACs of the layers that only this exit needs; 0 for the last exit, which is never dropped.
        cumulative_macs: MACs of all segments up to this exit, heads included.
        parameters: number of parameters of all segments up to this exit, heads included.
        number: number of the exit in the network, from 1. Export may leave exits out, so numbers can have gaps.
    """

    trunk_macs: int
    head_macs: int
    cumulative_macs: int
    parameters: int
    number: int


@dataclass(frozen=True)
class StaticSpec:
    """Cost of the static network, which is the same trunk with the last head alone: MACs and number of parameters."""

    macs: int
    parameters: int


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a segment; the first dimension of `shape` is the batch size, stored as -1."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class FileSpec:
    """A file of the bundle, with its hash and its size in bytes."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class SegmentSpec(FileSpec):
    """A segment. Its last output is the logits of its exit; the others are the inputs of the next segment."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Variant:
    """A set of segments, such as `fp32`.

    Attributes:
        segments: one per exit, in order.
        single_file: all segments in one graph, or None.
        static: the static network, from the image to the logits of the last exit; None in version 1. `Bundle.static`
            derives its bytes from the segments, so the file itself is optional.
    """

    segments: tuple[SegmentSpec, ...]
    single_file: FileSpec | None
    static: SegmentSpec | None = None


@dataclass(frozen=True)
class SplitSpec:
    """Number of samples of a split, and the sha256 of its indices."""

    n: int
    sha256: str


@dataclass(frozen=True)
class DataSpec:
    """The data set of the training, and its splits; `file` stores the indices."""

    data_set: str
    sha256: str
    parts: Mapping[str, SplitSpec]
    file: FileSpec


@dataclass(frozen=True)
class Manifest:
    """Everything in `bundle.json`; `static` is None in version 1."""

    format: str
    version: int
    name: str
    classes: tuple[str, ...]
    input: InputSpec
    exits: tuple[ExitSpec, ...]
    variants: Mapping[str, Variant]
    splits: DataSpec | None
    calibration: tuple[FileSpec, ...]
    provenance: Mapping[str, Any]
    static: StaticSpec | None = None

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.name):
            raise Damaged(
                f"bundle.json: '{self.name}' cannot be a bundle's name, which is part of URLs: use at most 64 letters, "
                "digits, '.', '_' and '-', the first a letter or digit"
            )
        if len(self.classes) < 2:
            raise Damaged(f"bundle.json: at least 2 classes are needed, found {len(self.classes)}")
        bad = [name for name in self.classes if not is_class_name(name)]
        if bad:
            raise Damaged(f"bundle.json: the class name {bad[0]!r} is empty or has control characters")
        if len(self.exits) < 1 or "fp32" not in self.variants:
            raise Damaged("bundle.json: at least one exit and the variant fp32 are needed")
        for name, variant in self.variants.items():
            if len(variant.segments) != len(self.exits):
                raise Damaged(
                    f"bundle.json: {len(self.exits)} exits need {len(self.exits)} segments, "
                    f"variant {name} has {len(variant.segments)}"
                )
            _check_chain(name, variant, self.input.shape, len(self.classes))
            if (variant.static is None) != (self.static is None):
                raise Damaged(f"bundle.json: static and the static network of variant {name} must both be there")
        if self.static is not None and self.static.macs <= 0:
            raise Damaged(f"bundle.json: static.macs must be positive, found {self.static.macs}")
        if any(later <= earlier for earlier, later in pairwise((0, *self.numbers))):
            raise Damaged(f"bundle.json: the numbers of the exits must increase from 1, found {self.numbers}")
        costs = self.cumulative_macs
        if any(later < earlier for earlier, later in pairwise(costs)) or costs[0] <= 0:
            raise Damaged(f"bundle.json: cumulative_macs must be positive and not decrease, found {costs}")

    @property
    def numbers(self) -> tuple[int, ...]:
        """Number of each exit in the network, (E,)."""
        return tuple(spec.number for spec in self.exits)

    @property
    def cumulative_macs(self) -> tuple[int, ...]:
        """Cumulative MACs at each exit, (E,)."""
        return tuple(spec.cumulative_macs for spec in self.exits)

    @property
    def costs(self) -> Costs:
        """MACs of leaving at each exit and of the static network; in version 1 that is the network with every head."""
        static = self.cumulative_macs[-1] if self.static is None else self.static.macs
        return Costs(self.cumulative_macs, static)

    @property
    def graphs(self) -> tuple[FileSpec, ...]:
        """All ONNX files."""
        graphs: list[FileSpec] = []
        for variant in self.variants.values():
            graphs += [*variant.segments, *([variant.single_file] if variant.single_file else [])]
        return tuple(graphs)

    @property
    def files(self) -> tuple[FileSpec, ...]:
        """All files whose hash the manifest records."""
        return (*([self.splits.file] if self.splits else []), *self.calibration, *self.graphs)

    def to_json(self) -> dict[str, Any]:
        """The content of `bundle.json`."""
        value: dict[str, Any] = dataclasses.asdict(self)
        if self.input.prepare.grey_bits is None:
            del value["input"]["prepare"]["grey_bits"]
        if self.version == 1:
            del value["static"]
            for part in (*value["variants"].values(), *value["exits"]):
                del part["static" if "segments" in part else "number"]
        return value

    @staticmethod
    def from_json(value: Any) -> Manifest:
        """Decode `bundle.json`. Raises `Damaged` naming the field, `SchemaTooNew`."""
        check_format(value, FORMAT, VERSION, "bundle.json")
        manifest: Manifest = decode(_with_numbers(value) if value["version"] == 1 else value, Manifest, "bundle.json")
        return manifest


def _with_numbers(value: Any) -> Any:
    """The content of a `bundle.json` of version 1, in which every exit of the network was kept."""
    exits = value.get("exits")
    if not isinstance(exits, list):
        return value
    numbered = [{**one, "number": k} if isinstance(one, dict) else one for k, one in enumerate(exits, start=1)]
    return {**value, "exits": numbered}


def _check_chain(name: str, variant: Variant, image: tuple[int, ...], classes: int) -> None:
    """Check that inputs and outputs of consecutive segments match, and the shapes of image and logits."""
    expected = [(-1, *image)]
    for k, segment in enumerate(variant.segments, start=1):
        inputs = [tensor.shape for tensor in segment.inputs]
        if len(inputs) != len(expected) or not all(map(_match, inputs, expected)):
            raise Damaged(f"bundle.json: segment {k} of variant {name} has inputs {inputs}, expected {expected}")
        *carried, logits = [tensor.shape for tensor in segment.outputs] or [()]
        if not _match(logits, (-1, classes)):
            raise Damaged(f"bundle.json: segment {k} of variant {name} has logits {logits}, expected {(-1, classes)}")
        expected = carried
    if variant.static is not None:
        shapes = [tensor.shape for tensor in (*variant.static.inputs, *variant.static.outputs)]
        if len(shapes) != 2 or not _match(shapes[0], (-1, *image)) or not _match(shapes[1], (-1, classes)):
            raise Damaged(
                f"bundle.json: the static network of variant {name} has the tensors {shapes}, "
                f"expected {[(-1, *image), (-1, classes)]}"
            )


def _match(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes are equal, with -1 as any size."""
    return len(one) == len(other) and all(-1 in pair or pair[0] == pair[1] for pair in zip(one, other, strict=True))


def is_class_name(name: str) -> bool:
    """Whether a text can name a class: not empty, and without control characters, which terminals interpret."""
    return bool(name) and not UNPRINTABLE.search(name)
