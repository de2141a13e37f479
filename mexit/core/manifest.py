"""`bundle.json`: what a bundle says of itself. `docs/bundle-format.md` is the specification.

Frozen dataclasses mirror the file field by field; `Manifest.from_json` checks every field and every type,
so nothing that follows has to.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Union, get_args, get_origin, get_type_hints

from mexit.core.cost import Costs
from mexit.errors import Damaged, SchemaTooNew

FORMAT = "mexit-bundle"
VERSION = 1
_PREPARE_CHOICES = {
    "resize": ("bilinear", "box"),
    "fit": ("stretch", "cover", "contain"),
    "grey": ("luma",),
    "alpha": ("black", "white"),
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class PrepareSpec:
    """How an image becomes the input tensor; `data.preprocess` is the only reader.

    Attributes:
        resize: Pillow filter, antialiased: "bilinear" or "box".
        fit: "stretch", "cover" (scale, cut the rest off) or "contain" (scale, pad with black).
        crop: share of each side that is kept, around the centre, before fitting; 1.0 keeps all.
        grey: "luma" (ITU-R 601) where the input has one channel.
        alpha: colour behind transparent pixels, "black" or "white".
        exif: whether the orientation tag of a photograph is obeyed.
    """

    resize: str = "bilinear"
    fit: str = "stretch"
    crop: float = 1.0
    grey: str = "luma"
    alpha: str = "black"
    exif: bool = True

    def __post_init__(self) -> None:
        for name, choices in _PREPARE_CHOICES.items():
            if getattr(self, name) not in choices:
                raise Damaged(f"prepare.{name} must be one of {', '.join(choices)}, found {getattr(self, name)!r}")
        if not 0 < self.crop <= 1:
            raise Damaged(f"prepare.crop must lie in (0, 1], found {self.crop}")


@dataclass(frozen=True)
class InputSpec:
    """The input tensor: `size` is (H, W), `range` the values of a pixel."""

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
        if self.channels not in (1, 3) or not all(0 < side <= 4096 for side in self.size):
            raise Damaged(f"input must have 1 or 3 channels and 1 to 4096 pixels a side, found {self.shape}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, H, W)."""
        return (self.channels, *self.size)


@dataclass(frozen=True)
class ExitSpec:
    """Cost of one exit in MACs.

    Attributes:
        trunk_macs: of this segment's layers that later exits need too.
        head_macs: of the layers that only this exit needs; 0 for the last exit, which cannot be dropped.
        cumulative_macs: of everything that has run when this exit answers, earlier heads included.
        parameters: of everything up to this exit, earlier heads included.
    """

    trunk_macs: int
    head_macs: int
    cumulative_macs: int
    parameters: int


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor of a segment; the first dimension of `shape` is the batch, written as -1."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class FileSpec:
    """A file of the bundle."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class SegmentSpec:
    """One segment; its last output is the logits of its exit, the others are the next segment's inputs."""

    file: str
    sha256: str
    bytes: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Variant:
    """One set of segments, such as `fp32`; `single_file` holds all of them in one graph."""

    segments: tuple[SegmentSpec, ...]
    single_file: FileSpec | None


@dataclass(frozen=True)
class SplitSpec:
    """Size of a split and the hash of its indices."""

    n: int
    sha256: str


@dataclass(frozen=True)
class DataSpec:
    """Which data the network was trained on, and how it was split; `file` stores the indices."""

    data_set: str
    sha256: str
    parts: Mapping[str, SplitSpec]
    file: FileSpec


@dataclass(frozen=True)
class Manifest:
    """Everything in `bundle.json`."""

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

    def __post_init__(self) -> None:
        check_name(self.name)
        if len(self.classes) < 2:
            raise Damaged(f"bundle.json: at least 2 classes are needed, found {len(self.classes)}")
        bad = [name for name in self.classes if not is_class_name(name)]
        if bad:
            raise Damaged(f"bundle.json: {bad[0]!r} is no class name: it is empty or holds control characters")
        if len(self.exits) < 1 or "fp32" not in self.variants:
            raise Damaged("bundle.json: an exit and the variant fp32 are needed")
        for name, variant in self.variants.items():
            if len(variant.segments) != len(self.exits):
                raise Damaged(
                    f"bundle.json: {len(self.exits)} exits need {len(self.exits)} segments, "
                    f"variant {name} has {len(variant.segments)}"
                )
            _check_chain(name, variant, self.input.shape, len(self.classes))
        costs = self.cumulative_macs
        if any(later < earlier for earlier, later in pairwise(costs)) or costs[0] <= 0:
            raise Damaged(f"bundle.json: cumulative costs must be positive and never fall, found {costs}")

    @property
    def cumulative_macs(self) -> tuple[int, ...]:
        """Cost of leaving at each exit, (E,)."""
        return tuple(spec.cumulative_macs for spec in self.exits)

    @property
    def costs(self) -> Costs:
        """Cost of leaving at each exit, and what of it are heads."""
        return Costs(self.cumulative_macs, tuple(spec.head_macs for spec in self.exits))

    @property
    def graphs(self) -> tuple[FileSpec, ...]:
        """Every ONNX file, whatever it is called."""
        found: list[FileSpec] = []
        for variant in self.variants.values():
            found += [FileSpec(spec.file, spec.sha256, spec.bytes) for spec in variant.segments]
            found += [variant.single_file] if variant.single_file else []
        return tuple(found)

    @property
    def files(self) -> tuple[FileSpec, ...]:
        """Every file that the manifest vouches for."""
        return (*([self.splits.file] if self.splits else []), *self.calibration, *self.graphs)

    def to_json(self) -> dict[str, Any]:
        """As `bundle.json` stores it."""
        value: dict[str, Any] = dataclasses.asdict(self)
        return value

    @staticmethod
    def from_json(value: Any) -> Manifest:
        """Check and convert. Raises `Damaged` naming the field, `SchemaTooNew`."""
        check_format(value, FORMAT, VERSION, "bundle.json")
        manifest = read_value(value, Manifest, "bundle.json")
        assert isinstance(manifest, Manifest)
        return manifest


def _check_chain(name: str, variant: Variant, image: tuple[int, ...], classes: int) -> None:
    """Each segment takes what the one before gives, the first an image; each gives logits last."""
    given = [(-1, *image)]
    for k, segment in enumerate(variant.segments, start=1):
        taken = [tensor.shape for tensor in segment.inputs]
        if len(taken) != len(given) or not all(map(_fits, taken, given)):
            raise Damaged(f"bundle.json: segment {k} of variant {name} takes {taken}, but it is given {given}")
        *carried, logits = [tensor.shape for tensor in segment.outputs] or [()]
        if not _fits(logits, (-1, classes)):
            raise Damaged(
                f"bundle.json: segment {k} of variant {name} gives logits {logits}, {(-1, classes)} are expected"
            )
        given = carried


def _fits(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes agree; -1 stands for any size."""
    return len(one) == len(other) and all(
        -1 in pair or pair[0] == pair[1] for pair in zip(one, other, strict=True)
    )


def check_name(name: str) -> str:
    """A bundle's name is also the served model's name, so it must be safe in a URL."""
    if not NAME_PATTERN.fullmatch(name):
        raise Damaged(f"'{name}' is no bundle name: letters, digits, '.', '_' and '-', 64 at most")
    return name


def is_class_name(name: str) -> bool:
    """Class names are shown on terminals and sent as JSON, so they hold no control characters."""
    return bool(name) and not _CONTROL.search(name)


def check_format(value: Any, expected: str, version: int, where: str) -> None:
    """The first two fields of every mexit JSON file."""
    if not isinstance(value, dict) or value.get("format") != expected:
        found = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise Damaged(f"{where}: expected format '{expected}', found {found!r}")
    found_version = value.get("version")
    if not isinstance(found_version, int) or isinstance(found_version, bool) or found_version < 1:
        raise Damaged(f"{where}: version must be a positive whole number, found {found_version!r}")
    if found_version > version:
        raise SchemaTooNew(
            f"{where}: version {found_version} is newer than this mexit reads ({version}): "
            "upgrade mexit, or export the bundle again with this one"
        )


def read_value(value: Any, kind: Any, where: str) -> Any:
    """Convert plain JSON to the annotated type `kind`, or raise `Damaged` naming the place."""
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(value, kind, where)
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        choices = [choice for choice in get_args(kind) if choice is not type(None)]
        return (
            None if value is None and len(choices) < len(get_args(kind)) else read_value(value, choices[0], where)
        )
    if origin is tuple:
        return _read_tuple(value, get_args(kind), where)
    if origin is not None and issubclass(origin, Mapping):
        item = get_args(kind)[1]
        return {key: read_value(entry, item, f"{where}.{key}") for key, entry in _read_dict(value, where).items()}
    if kind is Any:
        return value
    good = isinstance(value, (int, float) if kind is float else kind) and not (
        isinstance(value, bool) and kind is not bool
    )
    if not good:
        raise Damaged(f"{where}: expected {kind.__name__}, found {value!r}")
    return float(value) if kind is float else value


def _read_dataclass(value: Any, kind: Any, where: str) -> Any:
    entries = _read_dict(value, where)
    hints = _hints(kind)
    missing = [field.name for field in dataclasses.fields(kind) if field.name not in entries]
    if missing:
        raise Damaged(f"{where}: missing {', '.join(missing)}")
    return kind(
        **{
            field.name: read_value(entries[field.name], hints[field.name], f"{where}.{field.name}")
            for field in dataclasses.fields(kind)
        }
    )


# A frontier has hundreds of points, and working out the types of one takes longer than reading it.
_hints = lru_cache(maxsize=None)(get_type_hints)


def _read_dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Damaged(f"{where}: expected an object, found {value!r}")
    return value


def _read_tuple(value: Any, kinds: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise Damaged(f"{where}: expected a list, found {value!r}")
    if kinds[-1] is not Ellipsis:
        if len(value) != len(kinds):
            raise Damaged(f"{where}: expected {len(kinds)} entries, found {len(value)}")
        return tuple(
            read_value(item, kind, f"{where}[{i}]")
            for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
        )
    return tuple(read_value(item, kinds[0], f"{where}[{i}]") for i, item in enumerate(value))
