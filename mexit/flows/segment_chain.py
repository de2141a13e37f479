"""Runs exported segments that are not in a bundle yet, in ONNX Runtime or torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mexit.export.onnx_export import OnnxSegment
from mexit.runtime.backends.base import HostCarried
from mexit.runtime.backends.ort import OrtSegment

Arrays = Sequence[NDArray[np.float32]]
RunSegment = Callable[[Arrays], Arrays]  # carried features to the next ones, then the logits


def ort_segment(segment: OnnxSegment) -> OrtSegment:
    """A segment in ONNX Runtime with one thread."""
    return OrtSegment(segment.content, segment.inputs, segment.outputs, segment.outputs[-1].name)


def ort_runner(segment: OnnxSegment) -> RunSegment:
    """A segment in ONNX Runtime, from its inputs to its outputs."""
    opened = ort_segment(segment)

    def run(arrays: Arrays) -> Arrays:
        features, logits = opened.run(HostCarried(arrays))
        return [*features.arrays, logits]

    return run


def run_chain(segments: Sequence[RunSegment], images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Run images (B, C, H, W) through all segments; returns the logits of every exit, (E, B, C)."""
    carried: Arrays = [images]
    exits = []
    for run in segments:
        *carried, logits = run(carried)
        exits.append(logits)
    return np.stack(exits)
