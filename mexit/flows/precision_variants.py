"""`mexit export --precision`: the same segments in int8 or float16, and how far they are from float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mexit.core.manifest import InputSpec
from mexit.core.policies import PARITY
from mexit.core.progress import Progress
from mexit.data.dataset import DataSet
from mexit.data.splits import Splits
from mexit.errors import UsageError
from mexit.flows.sample_sources import BATCH, evenly_spaced
from mexit.runtime.backends.base import HostCarried, Segment
from mexit.runtime.backends.ort import OrtSegment
from mexit.runtime.reference import run_all_exits

if TYPE_CHECKING:
    from mexit.export.onnx_export import OnnxSegment
    from mexit.export.parity import Parity
    from mexit.export.segments import Cut

PRECISIONS = (PARITY, "int8", "fp16")
CALIBRATION_IMAGES = 256  # their features in every layer set the scales of int8
CHECKED_IMAGES = 2000
CHECKED_SPLIT = "selection"


@dataclass(frozen=True)
class Converted:
    """The segments in another precision, and the proof of how they answer."""

    segments: tuple[OnnxSegment, ...]
    parity: Parity


def check_precision(precision: str) -> None:
    """Raise `UsageError` unless it is one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision '{precision}': choose from {', '.join(PRECISIONS)}")


def convert(
    cuts: Sequence[Cut],
    segments: Sequence[OnnxSegment],
    precision: str,
    data: DataSet,
    splits: Splits,
    spec: InputSpec,
    progress: Progress,
) -> Converted:
    """Convert every segment to int8 or fp16.

    Scales of int8 come from the calibration split, with the features that the float32 segments before give:
    measured, those of the quantised segments set scales that are no better on any of three networks. The
    comparison is made on the selection split.

    Args:
        cuts: the network in torch.
        segments: the same in ONNX, fp32.
        precision: "int8" or "fp16".
        data, splits, spec: where images come from.
        progress: who listens.

    Raises:
        BackendError: the network leaves the range of that precision.
        MissingExtra: onnxruntime is not installed.
    """
    from mexit.export.parity import Parity, compare

    opened = [_open(segment) for segment in segments]
    images = data.batch(evenly_spaced(splits.part("calibration"), CALIBRATION_IMAGES), spec)
    carried = HostCarried([images])
    converted: list[OnnxSegment] = []
    with progress.track(f"converting segments to {precision}", len(segments)) as advance:
        for segment, fp32 in zip(segments, opened, strict=True):
            converted.append(_convert(segment, precision, carried))
            carried = fp32.run(carried)[0]
            advance(1, "")
    found = [_open(segment) for segment in converted]
    index = evenly_spaced(splits.part(CHECKED_SPLIT), CHECKED_IMAGES)
    chains = opened, [_Half(cut) for cut in cuts] if precision == "fp16" else found
    expected, other = (_logits(_Chain(chain), data, index, spec) for chain in chains)
    exits = compare(expected, other, data.labels[index])
    return Converted(tuple(converted), Parity(precision, CHECKED_SPLIT, len(index), exits))


def _convert(segment: OnnxSegment, precision: str, carried: HostCarried) -> OnnxSegment:
    from mexit.export.fp16 import to_half
    from mexit.export.int8 import to_int8

    return to_int8(segment, carried.arrays) if precision == "int8" else to_half(segment)


def _open(segment: OnnxSegment) -> OrtSegment:
    return OrtSegment(segment.content, segment.inputs, segment.outputs, segment.outputs[-1].name)


class _Half:
    """A segment in torch, in float16."""

    def __init__(self, cut: Cut) -> None:
        from mexit.export.fp16 import HalfModule

        self._module = HalfModule(cut.module)

    def run(self, carried: HostCarried) -> tuple[HostCarried, NDArray[np.float32]]:
        *features, logits = self._module(carried.arrays)
        return HostCarried(features), logits

    def features(self, carried: HostCarried) -> HostCarried:
        return self.run(carried)[0]


class _Chain:
    """Segments that are in no bundle yet, as a backend."""

    engine, precision, variant = "ort", PARITY, PARITY
    drops_heads = False

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments

    def carry(self, images: NDArray[np.float32]) -> HostCarried:
        return HostCarried([images])


def _logits(chain: _Chain, data: DataSet, index: NDArray[np.int64], spec: InputSpec) -> NDArray[np.float32]:
    """Logits (E, N, C) of the images at these places."""
    parts = np.array_split(index, range(BATCH, len(index), BATCH))
    return np.concatenate([run_all_exits(chain, data.batch(part, spec)) for part in parts], axis=1)
