"""int8 by ONNX Runtime's static quantisation: activations U8, weights S8 per channel, as Q/DQ nodes in the graph.

The layer that makes the logits stays in float32. Quantised, it is cut off at the largest logit that the
calibration images happened to give: on MNIST a logit was off by 4.7, against 0.3 with a float last layer. Every
other operator is quantised: convolutions and linear layers alone came out slower and no closer on three networks.
What crosses from one segment to the next is float32 too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.errors import missing_extra
from mexit.export.onnx_export import OnnxSegment, finished

BATCH = 32


def to_int8(segment: OnnxSegment, inputs: Sequence[NDArray[np.float32]]) -> OnnxSegment:
    """Quantise one segment.

    Args:
        segment: in float32.
        inputs: what the segment takes on N calibration images, each (N, ...); their ranges set the scales.

    Raises:
        MissingExtra: onnxruntime is not installed.
    """
    try:
        from onnxruntime import quantization
        from onnxruntime.quantization.quant_utils import add_pre_process_metadata
    except ImportError:
        raise missing_extra("onnxruntime", "cpu", "Exporting in int8") from None
    model = type(segment.model)()
    model.CopyFrom(segment.model)
    add_pre_process_metadata(model)  # torch's exporter folded constants and batch norms; shapes are inferred
    with tempfile.TemporaryDirectory(prefix="mexit-int8-") as folder:
        quantised = Path(folder) / "segment.onnx"
        quantization.quantize_static(
            model,
            quantised,
            _reader(segment, inputs),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=[_maker_of_logits(segment.model.graph).name],
        )
        model.ParseFromString(quantised.read_bytes())
    return finished(model, segment.parameters)


def _reader(segment: OnnxSegment, inputs: Sequence[NDArray[np.float32]]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # the package has no types
        def __init__(self) -> None:
            self._feeds = _feeds(segment, inputs)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return next(self._feeds, None)

    return Reader()


def _feeds(
    segment: OnnxSegment, inputs: Sequence[NDArray[np.float32]]
) -> Iterator[dict[str, NDArray[np.float32]]]:
    names = [tensor.name for tensor in segment.inputs]
    for start in range(0, len(inputs[0]), BATCH):
        yield {name: array[start : start + BATCH] for name, array in zip(names, inputs, strict=True)}


def _maker_of_logits(graph: Any) -> Any:
    return next(node for node in graph.node if graph.output[-1].name in node.output)
