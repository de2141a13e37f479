"""The whole adaptive network as one ONNX graph: later segments lie inside nested `If`s, so that they run only for
an image that is not sure yet. For programs with an ONNX engine and nothing else; one image a call.

    inputs   the image (1, C, H, W) float32 in [0, 1], under the bundle's name for it
             thresholds (E-1,) float64, NaN = never leave here; temperatures (E,) float64
             measure int64 scalar, a place in `core.single_file.MEASURES`; ensemble bool scalar
    outputs  logits (1, C) float32 and probabilities (1, C) float64 of the exit that answered,
             exit (1,) int64 from 1, score (1,) float64

Scores are float64 as in `core.scores`, computed by the engine's own exp and log: equal to about 1e-12. The
measure `agreement` is not in the graph: it has no float64 arc tangent in common engines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import TensorProto, helper

from mexit.core.single_file import MEASURES, OUTPUTS
from mexit.errors import UsageError

MOST_EXITS = 20  # each is nested in the one before, and loaders bound the depth
_DOUBLE, _FLOAT, _INT64, _BOOL = TensorProto.DOUBLE, TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def single_file(segments: Sequence[onnx.ModelProto]) -> bytes:
    """Nest the segments of one network, each as `to_onnx` exports it.

    Raises:
        UsageError: more exits than can be nested.
    """
    if len(segments) > MOST_EXITS:
        raise UsageError(f"a single file holds at most {MOST_EXITS} exits, this network has {len(segments)}")
    first, classes = segments[0].graph, segments[0].graph.output[-1].type.tensor_type.shape.dim[-1].dim_value
    image = first.input[0]
    height_width = [dim.dim_value for dim in image.type.tensor_type.shape.dim[1:]]
    graph = _Graph("mexit")
    _exit(graph, segments, 1, None, classes)
    exits = len(segments)
    made = helper.make_graph(
        graph.nodes,
        "mexit",
        [
            helper.make_tensor_value_info(image.name, _FLOAT, [1, *height_width]),
            helper.make_tensor_value_info("thresholds", _DOUBLE, [exits - 1]),
            helper.make_tensor_value_info("temperatures", _DOUBLE, [exits]),
            helper.make_tensor_value_info("measure", _INT64, []),
            helper.make_tensor_value_info("ensemble", _BOOL, []),
        ],
        _outputs("", classes),
        graph.initializers,
    )
    model = helper.make_model(
        made, opset_imports=segments[0].opset_import, ir_version=segments[0].ir_version, producer_name="mexit"
    )
    helper.set_model_props(model, {"mexit.measures": ",".join(MEASURES)})
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content


@dataclass
class _Graph:
    """Nodes and constants of one (sub)graph; `prefix` keeps its names apart from those of all others."""

    prefix: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output, whose name is returned."""
        name = f"{self.prefix}.{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name, **attributes))
        return name

    def constant(self, kind: int, shape: Sequence[int], values: Sequence[float]) -> str:
        """An initializer, whose name is returned."""
        name = f"{self.prefix}.constant_{len(self.initializers)}"
        self.initializers.append(helper.make_tensor(name, kind, shape, values))
        return name

    def include(self, segment: onnx.GraphProto, prefix: str) -> list[str]:
        """The nodes of a segment; its inputs and outputs keep their names, which join it to its neighbours."""
        kept = {value.name for value in (*segment.input, *segment.output)} | {""}

        def renamed(names: Sequence[str]) -> list[str]:
            return [name if name in kept else f"{prefix}.{name}" for name in names]

        for tensor in segment.initializer:
            copy = onnx.TensorProto()
            copy.CopyFrom(tensor)
            (copy.name,) = renamed([tensor.name])
            self.initializers.append(copy)
        for place, node in enumerate(segment.node):
            twin = onnx.NodeProto()
            twin.CopyFrom(node)
            twin.name = f"{prefix}.{place}.{node.name}"
            twin.input[:], twin.output[:] = renamed(node.input), renamed(node.output)
            self.nodes.append(twin)
        return [value.name for value in segment.output]


def _exit(graph: _Graph, segments: Sequence[onnx.ModelProto], k: int, total: str | None, classes: int) -> None:
    """Segment `k`, its score, and an `If` that holds all later ones; `total` is the ensemble's sum so far."""
    logits = graph.include(segments[k - 1].graph, f"segment_{k}")[-1]
    log_answer, total = _log_answer(graph, k, logits, total)
    probabilities = graph.add("Exp", log_answer)
    score = _score(graph, log_answer, probabilities, classes)
    last = k == len(segments)
    out = graph if last else _Graph(f"leave_{k}")
    answer: tuple[str, ...] = (
        out.add("Identity", logits),
        out.add("Identity", probabilities),
        out.add("Identity", out.constant(_INT64, [1], [k])),
        out.add("Identity", score),
    )
    if not last:
        place = graph.constant(_INT64, [1], [k - 1])
        sure = graph.add("GreaterOrEqual", score, graph.add("Gather", "thresholds", place))
        leave = helper.make_graph(out.nodes, f"leave_{k}", [], _typed(answer, classes), out.initializers)
        later = _Graph(f"go_on_{k}")
        _exit(later, segments, k + 1, total, classes)
        names = [later.prefix + "/" + name for name in OUTPUTS]
        go_on = helper.make_graph(later.nodes, f"go_on_{k}", [], _typed(names, classes), later.initializers)
        answer = tuple(f"{graph.prefix}.answer.{name}" for name in OUTPUTS)
        condition = graph.add("Squeeze", sure)
        graph.nodes.append(
            helper.make_node("If", [condition], answer, f"if_{k}", then_branch=leave, else_branch=go_on)
        )
    prefix = "" if k == 1 else graph.prefix + "/"
    for inner, name in zip(answer, OUTPUTS, strict=True):
        graph.nodes.append(helper.make_node("Identity", [inner], [prefix + name], f"{prefix}{name}"))


def _log_answer(graph: _Graph, k: int, logits: str, total: str | None) -> tuple[str, str]:
    """Log-probabilities with which exit `k` answers, and the log of the sum of the exits so far, each (1, C)."""
    temperature = graph.add("Gather", "temperatures", graph.constant(_INT64, [1], [k - 1]))
    log_exit = _log_softmax(graph, graph.add("Div", graph.add("Cast", logits, to=_DOUBLE), temperature))
    if total is None:
        return log_exit, log_exit
    larger = graph.add("Max", total, log_exit)
    parts = [graph.add("Exp", graph.add("Sub", part, larger)) for part in (total, log_exit)]
    total = graph.add("Add", larger, graph.add("Log", graph.add("Add", *parts)))
    mean = graph.add("Sub", total, graph.constant(_DOUBLE, [1], [math.log(k)]))
    return graph.add("Where", "ensemble", mean, log_exit), total


def _log_softmax(graph: _Graph, values: str) -> str:
    shifted = graph.add("Sub", values, _reduce(graph, "ReduceMax", values))
    return graph.add("Sub", shifted, graph.add("Log", _reduce(graph, "ReduceSum", graph.add("Exp", shifted))))


def _score(graph: _Graph, log_answer: str, probabilities: str, classes: int) -> str:
    """The score (1,) by the measure that the caller chooses."""
    top = _reduce(graph, "ReduceMax", log_answer)
    places = graph.constant(_INT64, [1, classes], range(classes))
    is_top = graph.add("Equal", places, graph.add("ArgMax", log_answer, axis=1))
    others = graph.add("Where", is_top, graph.constant(_DOUBLE, [1], [-math.inf]), log_answer)
    second = _reduce(graph, "ReduceMax", others)
    powers = graph.add("Exp", graph.add("Sub", others, second))
    log_others = graph.add("Add", second, graph.add("Log", _reduce(graph, "ReduceSum", powers)))
    scores = (
        graph.add("Sub", top, log_others),
        graph.add("Sub", top, second),
        _reduce(graph, "ReduceSum", graph.add("Mul", probabilities, log_answer)),
    )
    chosen = graph.add("Gather", graph.add("Concat", *scores, axis=1), "measure", axis=1)
    return chosen


def _reduce(graph: _Graph, operator: str, values: str) -> str:
    return graph.add(operator, values, graph.constant(_INT64, [1], [1]), keepdims=1)


def _outputs(prefix: str, classes: int) -> list[onnx.ValueInfoProto]:
    return _typed([prefix + name for name in OUTPUTS], classes)


def _typed(names: Sequence[str], classes: int) -> list[onnx.ValueInfoProto]:
    kinds = zip((_FLOAT, _DOUBLE, _INT64, _DOUBLE), ([1, classes], [1, classes], [1], [1]), strict=True)
    return [
        helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in zip(names, kinds, strict=True)
    ]
