"""Merges consecutive ONNX segments into one without the heads between them; needs no onnx package.

The outputs of a segment and the inputs of the next one are connected by name. All other names get the prefix `s<k>.`,
k the place of the segment from 1, so that names of different segments do not collide. Nodes and weights on which no
output depends, such as inner heads, are left out. Equal input bytes give equal output bytes. Field numbers are those of
onnx.proto, IR version 13.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mexit.core.onnx_safety import fields
from mexit.errors import Damaged

_GRAPH, _OPSET, _METADATA, _FUNCTION = 7, 8, 14, 25  # fields of a model
_NODE, _GRAPH_NAME, _INITIALIZER, _INPUT, _OUTPUT, _VALUE_INFO, _SPARSE = 1, 2, 5, 11, 12, 13, 15  # of a graph
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_ATTRIBUTE = 1, 2, 3, 5
_SUBGRAPHS = (6, 11)  # fields of an attribute
_TENSOR_NAME, _VALUE_NAME = 8, 1
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2


@dataclass(frozen=True)
class _Node:
    """A node with its names; `content` is the protobuf message with these names."""

    inputs: tuple[bytes, ...]
    outputs: tuple[bytes, ...]
    content: bytes


@dataclass
class _Graph:
    """The parts of a graph that a merge needs; messages by the name of their value, in the order of the file."""

    nodes: list[_Node] = field(default_factory=list)
    initializers: dict[bytes, bytes] = field(default_factory=dict)
    inputs: dict[bytes, bytes] = field(default_factory=dict)
    outputs: dict[bytes, bytes] = field(default_factory=dict)
    value_info: dict[bytes, bytes] = field(default_factory=dict)


def merge_models(contents: Sequence[bytes], name: str, *, only_logits: bool = False) -> bytes:
    """Merge consecutive segments of a network into one ONNX model.

    Args:
        contents: bytes of the ONNX files, in order; the last output of each is the logits of its exit.
        name: name of the file, for messages.
        only_logits: leave out the carried features of the last segment, and what only they need.

    Returns:
        The bytes of a model from the inputs of the first segment to the outputs of the last one.

    Raises:
        Damaged: the bytes are not ONNX models that fit together, or a node has a subgraph or a model functions, whose
            names are not renamed.
    """
    models = [list(fields(memoryview(content), name)) for content in contents]
    graphs = [_read_graph(model, name) for model in models]
    merged, carried = _Graph(inputs=graphs[0].inputs), set(graphs[0].inputs)
    for k, graph in enumerate(graphs, start=1):
        if not set(graph.inputs) <= carried:
            missing = b", ".join(sorted(set(graph.inputs) - carried)).decode(errors="replace")
            raise Damaged(f"{name}: segment {k} needs {missing}, which segment {k - 1} does not compute")
        _append(merged, graph, f"s{k}.".encode())
        carried = set(graph.outputs)
    outputs = list(graphs[-1].outputs)
    merged.outputs = {one: graphs[-1].outputs[one] for one in (outputs[-1:] if only_logits else outputs)}
    header = b"".join(
        _encode(number, value) for number, value in models[0] if number not in (_GRAPH, _OPSET, _METADATA)
    )
    return header + _encode(_GRAPH, _pruned(merged)) + _opsets(models, name)


def _read_graph(model: Sequence[tuple[int, int | memoryview]], name: str) -> _Graph:
    views = [value for number, value in model if number == _GRAPH and isinstance(value, memoryview)]
    if len(views) != 1 or any(number == _FUNCTION for number, _ in model):
        raise Damaged(f"{name}: a model with one graph and without functions is needed")
    graph = _Graph()
    messages = {
        _INITIALIZER: (graph.initializers, _TENSOR_NAME),
        _INPUT: (graph.inputs, _VALUE_NAME),
        _OUTPUT: (graph.outputs, _VALUE_NAME),
        _VALUE_INFO: (graph.value_info, _VALUE_NAME),
    }
    for number, value in fields(views[0], name):
        if not isinstance(value, memoryview):
            continue
        if number == _NODE:
            graph.nodes.append(_read_node(value, name))
        elif number == _SPARSE:
            raise Damaged(f"{name}: sparse weights cannot be merged")
        elif number in messages:
            by_name, name_field = messages[number]
            by_name[_name_of(value, name_field, name)] = bytes(value)
    if not graph.inputs or not graph.outputs:
        raise Damaged(f"{name}: a graph with inputs and outputs is needed")
    return graph


def _read_node(view: memoryview, name: str) -> _Node:
    names: dict[int, list[bytes]] = {_NODE_INPUT: [], _NODE_OUTPUT: []}
    for number, value in fields(view, name):
        if number in names and isinstance(value, memoryview):
            names[number].append(bytes(value))
        elif number == _NODE_ATTRIBUTE and isinstance(value, memoryview) and _has_subgraph(value, name):
            raise Damaged(f"{name}: nodes that hold graphs of their own cannot be merged")
    return _Node(tuple(names[_NODE_INPUT]), tuple(names[_NODE_OUTPUT]), bytes(view))


def _has_subgraph(attribute: memoryview, name: str) -> bool:
    return any(number in _SUBGRAPHS for number, _ in fields(attribute, name))


def _append(merged: _Graph, graph: _Graph, prefix: bytes) -> None:
    """Add the nodes, weights and shapes of a graph; its inputs and outputs keep their names."""
    keep = {*graph.inputs, *graph.outputs, b""}  # an empty name is an absent optional input

    def renamed(one: bytes) -> bytes:
        return one if one in keep else prefix + one

    for node in graph.nodes:
        inputs, outputs = tuple(map(renamed, node.inputs)), tuple(map(renamed, node.outputs))
        merged.nodes.append(_Node(inputs, outputs, _node_bytes(node, inputs, outputs, prefix)))
    for source, target, name_field in (
        (graph.initializers, merged.initializers, _TENSOR_NAME),
        (graph.value_info, merged.value_info, _VALUE_NAME),
    ):
        # A reader takes the last value of a field that occurs twice, so a name at the end replaces the first one.
        target |= {renamed(one): content + _encode(name_field, renamed(one)) for one, content in source.items()}
    merged.value_info |= graph.outputs


def _node_bytes(node: _Node, inputs: Sequence[bytes], outputs: Sequence[bytes], prefix: bytes) -> bytes:
    names = {_NODE_INPUT: iter(inputs), _NODE_OUTPUT: iter(outputs)}
    parts = []
    for number, value in fields(memoryview(node.content), ""):
        if number in names:
            parts.append(_encode(number, next(names[number])))
        elif number == _NODE_NAME and isinstance(value, memoryview):
            parts.append(_encode(number, prefix + bytes(value)))
        else:
            parts.append(_encode(number, value))
    return b"".join(parts)


def _pruned(graph: _Graph) -> bytes:
    """The bytes of a graph with the nodes, weights and shapes that its outputs need."""
    kept = _needed(graph)
    values = {name for node in kept for name in (*node.inputs, *node.outputs)} | set(graph.outputs)
    inner = {name: info for name, info in graph.value_info.items() if name in values - set(graph.outputs)}
    weights = {name: weight for name, weight in graph.initializers.items() if name in values}
    parts = [_encode(_NODE, node.content) for node in kept] + [_encode(_GRAPH_NAME, b"merged")]
    messages = ((_INITIALIZER, weights), (_INPUT, graph.inputs), (_OUTPUT, graph.outputs), (_VALUE_INFO, inner))
    return b"".join([*parts, *(_encode(number, one) for number, by_name in messages for one in by_name.values())])


def _needed(graph: _Graph) -> list[_Node]:
    """The nodes that the outputs depend on, in the order of the graph."""
    producers: Mapping[bytes, int] = {name: i for i, node in enumerate(graph.nodes) for name in node.outputs if name}
    needed: set[int] = set()
    pending = list(graph.outputs)
    while pending:
        i = producers.get(pending.pop())
        if i is not None and i not in needed:
            needed.add(i)
            pending += graph.nodes[i].inputs
    return [graph.nodes[i] for i in sorted(needed)]


def _opsets(models: Sequence[Sequence[tuple[int, int | memoryview]]], name: str) -> bytes:
    """The operator sets of all models. Raises `Damaged` if two models need different versions of one."""
    versions: dict[bytes, int] = {}
    for model in models:
        for number, value in model:
            if number != _OPSET or not isinstance(value, memoryview):
                continue
            parts = dict(fields(value, name))
            domain, version = bytes(parts.get(_OPSET_DOMAIN, b"")), parts.get(_OPSET_VERSION, 0)
            if not isinstance(version, int) or versions.setdefault(domain, version) != version:
                raise Damaged(f"{name}: the segments use different versions of the operator set {domain.decode()!r}")
    return b"".join(
        _encode(_OPSET, _encode(_OPSET_DOMAIN, domain) + _encode(_OPSET_VERSION, version))
        for domain, version in versions.items()
    )


def _name_of(view: memoryview, name_field: int, name: str) -> bytes:
    """The name in a message: its last value, see `_append`."""
    found = b""
    for number, value in fields(view, name):
        if number == name_field and isinstance(value, memoryview):
            found = bytes(value)
    return found


def _encode(number: int, value: int | bytes | memoryview) -> bytes:
    """A protobuf field that holds an integer, or bytes."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return b"".join([_varint(number << 3 | 2), _varint(len(value)), value])


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
