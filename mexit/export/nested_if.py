"""Write the whole early-exit network as one ONNX graph, for programs that have an ONNX engine but not mexit.

Each segment after the first lies inside the `If` of the exit before it, so it runs only for an image that has not
exited yet. One image a call.

    inputs   image (1, C, H, W) float32 in [0, 1], named as in the bundle
             thresholds (E-1,) float64, NaN = never exit here; temperatures (E,) float64
             measure int64 scalar, an index into `MEASURES`; ensemble bool scalar
    outputs  logits (1, C) float32 and probabilities (1, C) float64 of the exit that answers,
             exit (1,) int64, its number in the network, score (1,) float64

Scores are computed in float64 as in `core.scores` and agree with it to about 1e-12. The measure `agreement` is not
available: it needs an arc tangent in float64, which common engines lack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxscript import GraphBuilder, OpBuilder, ir

from mexit.core.exit_policy import Policy
from mexit.errors import UsageError

MEASURES = ("max-probability", "margin", "entropy")
OUTPUTS = ("logits", "probabilities", "exit", "score")
MAX_EXITS = 20  # each exit is one level of nesting, and ONNX loaders limit the depth


def build_single_file(segments: Sequence[onnx.ModelProto], numbers: Sequence[int] | None = None) -> bytes:
    """Nest the segments of one network in one ONNX file.

    Args:
        segments: float32 segments in order, as `onnx_export.export_segment` makes them.
        numbers: of the exits in the network, (E,), which the output `exit` names; default 1..E.

    Raises:
        UsageError: the network has more than `MAX_EXITS` exits.
    """
    if len(segments) > MAX_EXITS:
        raise UsageError(f"a single file holds at most {MAX_EXITS} exits, this network has {len(segments)}")
    first = segments[0].graph
    image_shape = [dim.dim_value for dim in first.input[0].type.tensor_type.shape.dim[1:]]
    classes = first.output[-1].type.tensor_type.shape.dim[-1].dim_value
    opsets = {opset.domain: opset.version for opset in segments[0].opset_import}
    builder = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports=opsets, name="mexit"))
    image = builder.input(first.input[0].name, ir.DataType.FLOAT, [1, *image_shape])
    network = _NestedNetwork(
        segments=[ir.from_proto(segment).graph for segment in segments],
        numbers=numbers or range(1, len(segments) + 1),
        classes=classes,
        thresholds=builder.input("thresholds", ir.DataType.DOUBLE, [len(segments) - 1]),
        temperatures=builder.input("temperatures", ir.DataType.DOUBLE, [len(segments)]),
        measure=builder.input("measure", ir.DataType.INT64, []),
        ensemble=builder.input("ensemble", ir.DataType.BOOL, []),
    )
    for name, value in zip(OUTPUTS, network.add_exit(builder.op, 1, [image], None), strict=True):
        builder.add_output(value, name)
    model = ir.Model(builder.graph, ir_version=segments[0].ir_version, producer_name="mexit")
    model.metadata_props["mexit.measures"] = ",".join(MEASURES)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    content: bytes = proto.SerializeToString()
    return content


def policy_inputs(policy: Policy) -> dict[str, NDArray[Any]]:
    """The inputs of a single file that select a policy: thresholds, temperatures, measure and ensemble.

    Raises:
        UsageError: the file cannot compute the policy's measure.
    """
    if policy.measure not in MEASURES:
        raise UsageError(
            f"the single file cannot score by {policy.measure}: calibrate with mexit calibrate --measure and one of "
            f"{', '.join(MEASURES)}"
        )
    return {
        "thresholds": np.array([np.nan if value is None else value for value in policy.thresholds], np.float64),
        "temperatures": np.array(policy.temperatures, np.float64),
        "measure": np.array(MEASURES.index(policy.measure), np.int64),
        "ensemble": np.array(policy.ensemble, np.bool_),
    }


@dataclass(frozen=True)
class _NestedNetwork:
    """Adds the nodes of a network's exits to a graph.

    Attributes:
        segments: in order.
        numbers: of their exits in the network.
        classes: C.
        thresholds, temperatures, measure, ensemble: inputs of the whole graph.
    """

    segments: Sequence[ir.Graph]
    numbers: Sequence[int]
    classes: int
    thresholds: ir.Value
    temperatures: ir.Value
    measure: ir.Value
    ensemble: ir.Value

    def add_exit(
        self, op: OpBuilder, k: int, carried: Sequence[ir.Value], log_total: ir.Value | None
    ) -> Sequence[ir.Value]:
        """Add segment k, its score, and an `If` that holds all later segments.

        Args:
            op: adds nodes to the graph of this nesting level.
            k: the exit, from 1.
            carried: the inputs of segment k.
            log_total: log of the summed probabilities of exits 1..k-1, (1, C); None at exit 1.

        Returns:
            One value for each of `OUTPUTS`.
        """
        op.builder.push_module(f"exit_{k}")  # a prefix of its own keeps the names of nested graphs apart
        *features, logits = self._add_segment(op, k, carried)
        log_probabilities, log_total = self._add_probabilities(op, k, logits, log_total)
        probabilities = op.Exp(log_probabilities)
        score = self._add_score(op, log_probabilities, probabilities)

        def answer(op: OpBuilder) -> Sequence[ir.Value]:
            return [op.Identity(value) for value in (logits, probabilities, [self.numbers[k - 1]], score)]

        def go_on(op: OpBuilder) -> Sequence[ir.Value]:
            return self.add_exit(op, k + 1, features, log_total)

        def branch(add_nodes: Callable[[OpBuilder], Sequence[ir.Value]]) -> ir.Graph:
            name = f"exit_{k}_{add_nodes.__name__}"
            return op.builder.subgraph(add_nodes, [], [ir.val(f"{name}.{output}") for output in OUTPUTS], name=name)

        if k == len(self.segments):
            return answer(op)
        exits_here = op.Squeeze(op.GreaterOrEqual(score, op.Gather(self.thresholds, [k - 1])))
        values: Sequence[ir.Value] = op.If(
            exits_here, then_branch=branch(answer), else_branch=branch(go_on), _outputs=len(OUTPUTS)
        )
        return values

    def _add_segment(self, op: OpBuilder, k: int, carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
        """Add the nodes and weights of segment k; return its outputs, logits last."""
        segment = self.segments[k - 1]
        for name, weight in list(segment.initializers.items()):
            del segment.initializers[name]
            weight.name = f"segment_{k}.{name}"
            op.builder.graph.register_initializer(weight)
        outputs = op.call_inline(ir.Function("", f"segment_{k}", graph=segment, attributes=[]), *carried)
        return outputs if isinstance(outputs, Sequence) else [outputs]

    def _add_probabilities(
        self, op: OpBuilder, k: int, logits: ir.Value, log_total: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """Log-probabilities with which exit k answers, and the log of the sum over exits 1..k, each (1, C) float64."""
        tempered = op.Div(op.Cast(logits, to=ir.DataType.DOUBLE), op.Gather(self.temperatures, [k - 1]))
        shifted = op.Sub(tempered, op.ReduceMax(tempered, [1]))  # not LogSoftmax: ONNX Runtime's drops a NaN
        log_exit = op.Sub(shifted, op.ReduceLogSumExp(shifted, [1]))
        if log_total is None:
            return log_exit, log_exit
        larger = op.Max(log_total, log_exit)
        total = op.Add(op.Exp(op.Sub(log_total, larger)), op.Exp(op.Sub(log_exit, larger)))
        log_total = op.Add(larger, op.Log(total))
        return op.Where(self.ensemble, op.Sub(log_total, math.log(k)), log_exit), log_total

    def _add_score(self, op: OpBuilder, log_probabilities: ir.Value, probabilities: ir.Value) -> ir.Value:
        """The score (1,) by each measure, then the one that the input `measure` selects."""
        ordered, _ = op.TopK(log_probabilities, [self.classes], axis=1, _outputs=2)
        largest, others = op.Split(ordered, [1, self.classes - 1], axis=1, _outputs=2)
        second = op.Gather(others, [0], axis=1)
        log_others = op.Add(second, op.ReduceLogSumExp(op.Sub(others, second), [1]))
        scores = (
            op.Sub(largest, log_others),
            op.Sub(largest, second),
            op.ReduceSum(op.Mul(probabilities, log_probabilities), [1]),
        )
        score: ir.Value = op.Gather(op.Concat(*scores, axis=1), self.measure, axis=1)
        return score
