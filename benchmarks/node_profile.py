"""The time of the nodes of an ONNX graph, by ONNX Runtime's own profile."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

LAYOUT = frozenset({"ReorderInput", "ReorderOutput"})
CONVERSION = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast"})
RUNS = 60


@dataclass(frozen=True)
class NodeTimes:
    """Microseconds of one run; ONNX Runtime records whole microseconds per node.

    Attributes:
        layers: of all other nodes.
        layout: of nodes that change the layout of a tensor.
        conversion: of nodes that change the type of a tensor.
    """

    layers: float = 0.0
    layout: float = 0.0
    conversion: float = 0.0

    def __add__(self, other: NodeTimes) -> NodeTimes:
        return NodeTimes(self.layers + other.layers, self.layout + other.layout, self.conversion + other.conversion)


def profile_graphs(graphs: Sequence[bytes], image: Any) -> NodeTimes:
    """The node times of graphs that run one after the other on an image (1, C, H, W), with one thread.

    The last output of each graph is its logits, and the others are the inputs of the next graph.
    """
    total, inputs = NodeTimes(), [image]
    for graph in graphs:
        times, outputs = _profile(graph, inputs)
        total, inputs = total + times, outputs[:-1]
    return total


def _profile(graph: bytes, inputs: Sequence[Any]) -> tuple[NodeTimes, list[Any]]:
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        named = {value.name: array for value, array in zip(session.get_inputs(), inputs, strict=True)}
        for _ in range(RUNS):
            outputs = session.run(None, named)
        events = json.loads(Path(session.end_profiling()).read_text())
    by_node: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if operator := event.get("args", {}).get("op_name"):
            by_node.setdefault((operator, event["name"]), []).append(event["dur"])
    kinds = {"layers": 0.0, "layout": 0.0, "conversion": 0.0}
    for (operator, _), micros in by_node.items():
        kind = "layout" if operator in LAYOUT else "conversion" if operator in CONVERSION else "layers"
        kinds[kind] += float(np.mean(sorted(micros)[: RUNS // 2]))  # the faster half: other programs disturb the rest
    return NodeTimes(**kinds), outputs
