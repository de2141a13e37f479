"""Quantise a segment to int8 with ONNX Runtime: activations U8, weights S8 per channel, as Q/DQ nodes.

The layer that computes the logits stays in float32. Quantised, it clips at the largest logit of the calibration
images: on MNIST one logit was off by 4.7, against 0.3 with a float32 last layer. All other operators are quantised;
quantising only convolutions and linear layers was slower and no closer on three networks. Features between segments
are float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from mexit.data.dataset import split_batches
from mexit.errors import requires_extra
from mexit.export.onnx_export import OnnxSegment, finalize

with requires_extra("cpu", "Exporting a network"):
    from onnxruntime import quantization
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

BATCH = 32


def quantize_int8(segment: OnnxSegment, inputs: Sequence[NDArray[np.float32]]) -> OnnxSegment:
    """Quantise a float32 segment.

    Args:
        segment: in float32.
        inputs: the segment's inputs on N calibration images, each (N, ...); the range of every activation on them
            sets its scale.
    """
    model = onnx.ModelProto()
    model.CopyFrom(segment.model)
    add_pre_process_metadata(model)  # nothing to pre-process: constants are folded and shapes inferred
    logits = model.graph.output[-1].name
    with tempfile.TemporaryDirectory(prefix="mexit-int8-") as folder:
        quantised = Path(folder) / "segment.onnx"
        quantization.quantize_static(
            model,
            quantised,
            _Reader(segment, inputs),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=[node.name for node in model.graph.node if logits in node.output],
        )
        return finalize(onnx.load(quantised), segment.parameters)


class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """A segment's inputs on the calibration images, in batches."""

    def __init__(self, segment: OnnxSegment, inputs: Sequence[NDArray[np.float32]]) -> None:
        names = [spec.name for spec in segment.inputs]
        batches = zip(*(split_batches(array, BATCH) for array in inputs), strict=True)
        self._feeds = (dict(zip(names, arrays, strict=True)) for arrays in batches)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._feeds, None)
