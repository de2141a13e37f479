"""float16 in the graph, float32 at its borders: for engines that compute what a graph says, such as TensorRT 11.

Weights are rounded once, here; a Cast follows every input and precedes every output. ONNX Runtime on a CPU
computes such a graph in float32 and so hides what it costs, overflow included: `HalfModule` asks torch, which
rounds the result of every layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.errors import BackendError
from mexit.export.onnx_export import OnnxSegment, finished

LARGEST = float(np.finfo(np.float16).max)


def to_half(segment: OnnxSegment) -> OnnxSegment:
    """Convert one segment. Raises `BackendError` if a weight is beyond float16."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(segment.model)
    graph = model.graph
    for tensor in graph.initializer:
        _halve(tensor)
    for node in graph.node:
        _halve_attributes(node)
    _cast_inputs(graph)
    _cast_outputs(graph)
    del graph.value_info[:]  # they say float32; `finished` infers them again
    return finished(model, segment.parameters)


class HalfModule:
    """A copy of a segment's module that computes in float16 between float32 borders."""

    def __init__(self, module: Any) -> None:
        self._module = copy.deepcopy(module).half()

    def __call__(self, arrays: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """What the segment takes, each (B, ...), to what it gives, logits last."""
        import torch

        with torch.no_grad():
            outputs = self._module(*(torch.from_numpy(array).half() for array in arrays))
        return [output.float().numpy() for output in outputs]


def _halve(tensor: Any) -> None:
    """A float32 TensorProto to float16, in place; others stay."""
    import onnx

    if tensor.data_type != onnx.TensorProto.FLOAT:
        return
    values = onnx.numpy_helper.to_array(tensor)
    if values.size and not np.abs(values).max() <= LARGEST:
        raise BackendError(f"{tensor.name} holds values beyond float16 ({LARGEST:.0f}): export in fp32 alone")
    tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), tensor.name))


def _halve_attributes(node: Any) -> None:
    """Constants, and casts to float32."""
    import onnx

    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT:
            attribute.i = onnx.TensorProto.FLOAT16
        if attribute.type == onnx.AttributeProto.TENSOR:
            _halve(attribute.t)
        if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            values = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            tensor = onnx.numpy_helper.from_array(np.asarray(values, np.float32), node.output[0])
            _halve(tensor)
            attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))


def _cast_inputs(graph: Any) -> None:
    import onnx

    for value in reversed(graph.input):
        half = f"{value.name}_half"
        if _rename(graph, "input", value.name, half):
            graph.node.insert(0, onnx.helper.make_node("Cast", [value.name], [half], to=onnx.TensorProto.FLOAT16))


def _cast_outputs(graph: Any) -> None:
    import onnx

    for value in graph.output:
        half = f"{value.name}_half"
        if _rename(graph, "output", value.name, half):
            _rename(graph, "input", value.name, half)
            graph.node.append(onnx.helper.make_node("Cast", [half], [value.name], to=onnx.TensorProto.FLOAT))


def _rename(graph: Any, side: str, before: str, after: str) -> bool:
    """Rename a tensor on one side of every node; whether it was there."""
    found = False
    for node in graph.node:
        names = getattr(node, side)
        for place, name in enumerate(names):
            if name == before:
                names[place] = after
                found = True
    return found
