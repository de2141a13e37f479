"""Convert a segment to float16 inside, float32 at its inputs and outputs.

Engines that compute in the types of the graph, such as TensorRT 11, then compute in float16. ONNX Runtime on a CPU
computes a float16 graph in float32, which hides rounding and overflow; `HalfModule` shows them with torch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnxscript import ir
from onnxscript.ir.passes.common import LiftConstantsToInitializersPass
from torch import nn

from mexit.errors import BackendError, requires_extra
from mexit.export.onnx_export import OnnxSegment, finalize

with requires_extra("cpu", "Exporting a network"):
    from onnxruntime.transformers.onnx_model import OnnxModel

MAX_FLOAT16 = float(np.finfo(np.float16).max)


def convert_fp16(segment: OnnxSegment) -> OnnxSegment:
    """Convert a float32 segment with ONNX Runtime's converter.

    Raises:
        BackendError: a weight lies outside float16's range; the converter would clip it.
    """
    model = ir.from_proto(segment.model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)  # the converter skips scalar ones
    proto = ir.to_proto(model)
    for tensor in proto.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if tensor.data_type == onnx.TensorProto.FLOAT and not (np.abs(values) <= MAX_FLOAT16).all():
            raise BackendError(f"{tensor.name} has values beyond float16's largest ({MAX_FLOAT16:.0f}): use fp32")
    converter = OnnxModel(proto)
    converter.convert_float_to_float16(keep_io_types=True, use_symbolic_shape_infer=False)
    converter.topological_sort()  # the converter appends its Cast nodes at the end
    return finalize(converter.model, segment.parameters, segment.head_parameters)


class HalfModule:
    """A copy of a segment's torch module that computes in float16, with float32 inputs and outputs."""

    def __init__(self, module: nn.Module) -> None:
        self._module = copy.deepcopy(module).half()

    def __call__(self, arrays: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Map the segment's inputs, each (B, ...), to its outputs, logits last."""
        with torch.no_grad():
            outputs = self._module(*(torch.from_numpy(array).half() for array in arrays))
        return [output.float().numpy() for output in outputs]
