"""Convert a network's segments to int8 or fp16, and compare them with float32 on the selection split."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mexit.core.manifest import InputSpec
from mexit.core.policies_file import PARITY
from mexit.core.progress import Progress
from mexit.data.dataset import DataSet, evenly_spaced, split_batches
from mexit.data.splits import Splits
from mexit.export.fp16 import HalfModule, convert_fp16
from mexit.export.int8 import quantize_int8
from mexit.export.onnx_export import OnnxSegment
from mexit.export.segments import TorchSegment
from mexit.export.validate import PrecisionReport, compare_precisions
from mexit.flows.sample_sources import BATCH
from mexit.runtime.backends.base import HostCarried
from mexit.runtime.backends.ort import OrtSegment

PRECISIONS = (PARITY, "int8", "fp16")
CALIBRATION_IMAGES = 256  # their activations set the scales of int8
COMPARED_IMAGES = 2000
COMPARED_SPLIT = "selection"

Arrays = Sequence[NDArray[np.float32]]
RunSegment = Callable[[Arrays], Arrays]  # carried features to the next ones, then the logits


def convert_segments(
    torch_segments: Sequence[TorchSegment],
    segments: Sequence[OnnxSegment],
    precision: str,
    data: DataSet,
    splits: Splits,
    spec: InputSpec,
    progress: Progress,
) -> tuple[list[OnnxSegment], PrecisionReport]:
    """Convert every segment to another precision.

    The scales of int8 come from images of the calibration split, carried through the float32 segments. Scales from
    the quantised segments were no better on three networks.

    Args:
        torch_segments: the network in torch.
        segments: the same segments in ONNX, float32.
        precision: "int8" or "fp16".
        data, splits, spec: source of the images.
        progress: receives the progress.

    Returns:
        The converted segments, and their comparison with float32 on the selection split.

    Raises:
        BackendError: a weight or an activation leaves the range of the precision.
    """
    run_fp32 = [_ort_runner(segment) for segment in segments]
    carried: Arrays = [data.batch(evenly_spaced(splits.part("calibration"), CALIBRATION_IMAGES), spec)]
    converted: list[OnnxSegment] = []
    with progress.track(f"converting segments to {precision}", len(segments)) as advance:
        for segment, run in zip(segments, run_fp32, strict=True):
            converted.append(quantize_int8(segment, carried) if precision == "int8" else convert_fp16(segment))
            *carried, _ = run(carried)
            advance(1, "")
    run_converted: list[RunSegment]
    if precision == "int8":
        run_converted = [_ort_runner(segment) for segment in converted]
    else:
        run_converted = [HalfModule(segment.module) for segment in torch_segments]
    index = evenly_spaced(splits.part(COMPARED_SPLIT), COMPARED_IMAGES)
    batches = [data.batch(part, spec) for part in split_batches(index, BATCH)]
    exits = compare_precisions(_logits(run_fp32, batches), _logits(run_converted, batches), data.labels[index])
    return converted, PrecisionReport(precision, COMPARED_SPLIT, len(index), exits)


def _ort_runner(segment: OnnxSegment) -> RunSegment:
    opened = OrtSegment(segment.content, segment.inputs, segment.outputs, segment.outputs[-1].name)

    def run(arrays: Arrays) -> Arrays:
        features, logits = opened.run(HostCarried(arrays))
        return [*features.arrays, logits]

    return run


def _logits(segments: Sequence[RunSegment], batches: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Run batches of images through the segments; return the logits (E, N, C)."""
    logits: list[NDArray[np.float32]] = []
    for images in batches:
        carried: Arrays = [images]
        exits = []
        for run in segments:
            *carried, exit_logits = run(carried)
            exits.append(exit_logits)
        logits.append(np.stack(exits))
    return np.concatenate(logits, axis=1)
