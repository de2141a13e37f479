"""The places of TensorRT engines: one folder for each segment, and one for the static network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mexit.core.bundle import Bundle
from mexit.core.manifest import SegmentSpec
from mexit.core.printable import shell_path
from mexit.runtime.device_cache import cache_folder

ENGINES, PLAN, RECORD = "engines", "engine.plan", "engine.json"
STATIC = 0  # stands for the static network where segments count from 1


@dataclass(frozen=True)
class EngineSlot:
    """The folder of one engine.

    Attributes:
        folder: holds `engine.plan` and `engine.json`.
        bundle, variant, segment: the segment (from 1, or `STATIC`) that the engine runs.
    """

    folder: Path
    bundle: Bundle
    variant: str
    segment: int

    @property
    def spec(self) -> SegmentSpec:
        """The segment in the manifest."""
        variant = self.bundle.manifest.variants[self.variant]
        if self.segment != STATIC:
            return variant.segments[self.segment - 1]
        assert variant.static is not None
        return variant.static

    @property
    def content(self) -> bytes:
        """The ONNX bytes of the segment."""
        if self.segment == STATIC:
            return self.bundle.static(self.variant)
        return self.bundle.segment(self.variant, self.segment)

    @property
    def remedy(self) -> str:
        """The command that repairs the cache."""
        return f"mexit export {shell_path(self.bundle.path)} --trt --replace builds all engines anew"


def cache_slot(bundle: Bundle, package: str, variant: str, segment: int) -> EngineSlot:
    """The place of an engine in the device cache."""
    folder = cache_folder(bundle.id) / ENGINES / package / variant / folder_name(segment)
    return EngineSlot(folder, bundle, variant, segment)


def folder_name(segment: int) -> str:
    """Name of the folder of an engine: the number of its segment, or "static"."""
    return "static" if segment == STATIC else str(segment)


def engine_segments(bundle: Bundle, variant: str) -> tuple[int, ...]:
    """The segments that have an engine each: 1..E, and `STATIC` if the bundle has a static network."""
    segments = tuple(range(1, len(bundle.manifest.exits) + 1))
    return segments if bundle.manifest.variants[variant].static is None else (*segments, STATIC)
