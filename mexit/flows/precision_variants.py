"""Convert a network's segments to int8 or fp16, and compare them with float32 on the selection split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
from mexit.flows.segment_chain import Arrays, RunSegment, ort_runner, run_chain

PRECISIONS = (PARITY, "int8", "fp16")
CALIBRATION_IMAGES = 256  # their activations set the scales of int8
COMPARED_IMAGES = 2000
COMPARED_SPLIT = "selection"


def convert_segments(
    torch_segments: Sequence[TorchSegment],
    segments: Sequence[OnnxSegment],
    precision: str,
    data: DataSet,
    splits: Splits,
    spec: InputSpec,
    progress: Progress,
    numbers: Sequence[int] | None = None,
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
        numbers: the number of each exit in the network, (E,); default 1..E.

    Returns:
        The converted segments, and their comparison with float32 on the selection split.

    Raises:
        BackendError: a weight or an activation leaves the range of the precision.
    """
    run_fp32 = [ort_runner(segment) for segment in segments]
    carried: Arrays = [data.batch(evenly_spaced(splits.part("calibration"), CALIBRATION_IMAGES), spec)]
    converted: list[OnnxSegment] = []
    with progress.track(f"converting segments to {precision}", len(segments)) as advance:
        for segment, run in zip(segments, run_fp32, strict=True):
            converted.append(quantize_int8(segment, carried) if precision == "int8" else convert_fp16(segment))
            *carried, _ = run(carried)
            advance(1, "")
    run_converted: list[RunSegment]
    if precision == "int8":
        run_converted = [ort_runner(segment) for segment in converted]
    else:
        run_converted = [HalfModule(segment.module) for segment in torch_segments]
    index = evenly_spaced(splits.part(COMPARED_SPLIT), COMPARED_IMAGES)
    batches = [data.batch(part, spec) for part in split_batches(index, BATCH)]
    logits_fp32, logits = (
        np.concatenate([run_chain(chain, images) for images in batches], axis=1) for chain in (run_fp32, run_converted)
    )
    exits = compare_precisions(logits_fp32, logits, data.labels[index], numbers)
    return converted, PrecisionReport(precision, COMPARED_SPLIT, len(index), exits)
