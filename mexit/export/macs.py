"""Count the MACs of an exported segment, operator by operator.

1 MAC = 1 multiply-add of a convolution or matrix product. Biases, activations, pooling and data movement count 0, as in
the papers. An operator outside `COUNTED` and `FREE` is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import prod

import onnx

from mexit.errors import BackendError
from mexit.export.onnx_export import BATCH

Shape = tuple[int, ...]

_MULTIPLE = re.compile(rf"(?:(\d+)\*)?{BATCH}")

FREE = frozenset({
    "Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Constant", "DequantizeLinear", "Div",
    "Expand", "Flatten", "Gather", "Gelu", "GlobalAveragePool", "HardSigmoid", "HardSwish", "Identity",
    "LayerNormalization", "MaxPool", "Mul", "Pad", "QuantizeLinear", "Range", "ReduceMean", "Relu", "Reshape", "Shape",
    "Sigmoid", "Slice", "Softmax", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze",
})  # fmt: skip


def count_macs(model: onnx.ModelProto) -> tuple[int, int]:
    """Count the MACs of one image through a segment.

    Args:
        model: with inferred shapes; its last output is the logits.

    Returns:
        (trunk, head): MACs that the carried features need, and MACs that only the logits need. The last segment has
        no carried features, so all of it is trunk.

    Raises:
        BackendError: an operator is not in the table, or a shape is unknown.
    """
    graph = model.graph
    shapes = _shapes(graph)
    costs = [_node_macs(node, shapes) for node in graph.node]
    features = [value.name for value in graph.output[:-1]]
    needed = _ancestors(graph, features or [graph.output[-1].name])
    trunk = sum(cost for i, cost in enumerate(costs) if i in needed)
    return trunk, sum(costs) - trunk


# MACs from the shapes of the inputs and of the output.
COUNTED: dict[str, Callable[[Sequence[Shape], Shape], int]] = {
    # Weights are (C_out, C_in / groups, k, k): each output value sums one product per weight of its channel.
    "Conv": lambda inputs, output: prod(output) * prod(inputs[1][1:]),
    "Gemm": lambda inputs, output: prod(output) * (prod(inputs[1]) // output[-1]),
    "MatMul": lambda inputs, output: prod(output) * inputs[0][-1],
}


def _node_macs(node: onnx.NodeProto, shapes: dict[str, Shape]) -> int:
    if node.domain not in ("", "ai.onnx") or (node.op_type not in COUNTED and node.op_type not in FREE):
        raise BackendError(
            f"cannot count the MACs of operator {node.domain or 'ai.onnx'}.{node.op_type}: supported are "
            f"{', '.join(sorted(COUNTED))} and, at no cost, {', '.join(sorted(FREE))}"
        )
    if node.op_type not in COUNTED:
        return 0
    missing = [name for name in (*node.input, *node.output) if name and name not in shapes]
    if missing:
        raise BackendError(f"cannot count the MACs of {node.op_type}: unknown shape of {', '.join(missing)}")
    return COUNTED[node.op_type]([shapes[name] for name in node.input if name], shapes[node.output[0]])


def _shapes(graph: onnx.GraphProto) -> dict[str, Shape]:
    """Shape of every tensor by name, with batch size 1. A first side without a value is the batch size."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        sides = [_side(dim) for dim in value.type.tensor_type.shape.dim]
        if all(side > 0 for side in sides[1:]):
            shapes[value.name] = tuple(side or 1 for side in sides)
    return shapes


def _side(dim: onnx.TensorShapeProto.Dimension) -> int:
    """A side of a tensor with batch size 1; 0 = unknown. Attention in windows has sides such as "4*batch"."""
    factor = _MULTIPLE.fullmatch(dim.dim_param)
    return int(dim.dim_value) or (int(factor[1] or 1) if factor else 0)


def _ancestors(graph: onnx.GraphProto, names: Sequence[str]) -> set[int]:
    """Indices of the nodes on which the named tensors depend."""
    producer = {name: i for i, node in enumerate(graph.node) for name in node.output}
    ancestors: set[int] = set()
    pending = list(names)
    while pending:
        i = producer.get(pending.pop())
        if i is not None and i not in ancestors:
            ancestors.add(i)
            pending += [name for name in graph.node[i].input if name]
    return ancestors
