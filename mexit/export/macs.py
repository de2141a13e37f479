"""MACs counted on the exported graph: a table of operators, one small function each.

One multiply-add is one MAC, and biases, activations, pooling and data movement are free, as in the papers'
convolution-and-linear counts. An operator that is not in the table is an error: a cost is never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from mexit.errors import BackendError

Shape = tuple[int, ...]

FREE = frozenset({
    "Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Constant", "DequantizeLinear", "Div",
    "Expand", "Flatten", "Gather", "GlobalAveragePool", "Identity", "MaxPool", "Mul", "Pad", "QuantizeLinear",
    "ReduceMean", "Relu", "Reshape", "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Squeeze", "Sub",
    "Transpose", "Unsqueeze",
})  # fmt: skip


def count(model: Any) -> tuple[int, int]:
    """MACs of one sample through an ONNX segment.

    Args:
        model: a ModelProto with inferred shapes, whose last output is the logits.

    Returns:
        (trunk, head): what later segments need too, and what only this exit needs. Where nothing else comes out
        (the last exit), everything is trunk.

    Raises:
        BackendError: an operator that cannot be counted, or a shape that is not known.
    """
    graph = model.graph
    shapes = _shapes(graph)
    costs = [_node_macs(node, shapes) for node in graph.node]
    features = [value.name for value in graph.output[:-1]]
    needed = _needed_for(graph, features or [graph.output[-1].name])
    trunk = sum(cost for place, cost in enumerate(costs) if place in needed)
    return trunk, sum(costs) - trunk


def _conv(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    # Weights are (C_out, C_in / groups, k, k): every output value costs one product a weight of its channel.
    return prod(outputs[0][1:]) * prod(inputs[1][1:])


def _gemm(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    features_in = prod(inputs[1]) // outputs[0][-1]
    return outputs[0][-1] * features_in


def _matmul(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    return prod(outputs[0][1:]) * inputs[0][-1]


COUNTED: dict[str, Callable[[Sequence[Shape], Sequence[Shape]], int]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
}


def _node_macs(node: Any, shapes: dict[str, Shape]) -> int:
    if node.domain not in ("", "ai.onnx") or (node.op_type not in COUNTED and node.op_type not in FREE):
        raise BackendError(
            f"cannot count the cost of operator {node.domain or 'ai.onnx'}.{node.op_type}: known are "
            f"{', '.join(sorted(COUNTED))} and the free {', '.join(sorted(FREE))}"
        )
    if node.op_type not in COUNTED:
        return 0
    missing = [name for name in (*node.input, *node.output) if name and name not in shapes]
    if missing:
        raise BackendError(f"cannot count {node.op_type}: the shapes of {', '.join(missing)} are not known")
    inputs, outputs = ([shapes[name] for name in names if name] for names in (node.input, node.output))
    return COUNTED[node.op_type](inputs, outputs)


def _shapes(graph: Any) -> dict[str, Shape]:
    """Shapes by name; the batch dimension counts as 1."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        dims = value.type.tensor_type.shape.dim
        if all(dim.dim_value > 0 for dim in dims[1:]):
            shapes[value.name] = tuple(dim.dim_value or 1 for dim in dims)
    return shapes


def _needed_for(graph: Any, names: Sequence[str]) -> set[int]:
    """Places of the nodes that these outputs depend on."""
    maker = {name: place for place, node in enumerate(graph.node) for name in node.output}
    found: set[int] = set()
    todo = list(names)
    while todo:
        place = maker.get(todo.pop())
        if place is not None and place not in found:
            found.add(place)
            todo += [name for name in graph.node[place].input if name]
    return found
