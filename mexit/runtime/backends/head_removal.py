"""Removes outputs, such as the logits of an exit, from an ONNX model, without the onnx package.

Engines run every node of a graph, also those whose results are not used. The nodes and weights that only a removed
output needs are therefore left out of the file's bytes; all other bytes stay. Field numbers are those of onnx.proto,
IR version 13.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mexit.core.onnx_safety import fields
from mexit.errors import Damaged

_GRAPH = 7  # field of a model
_NODE, _INITIALIZER, _OUTPUT, _VALUE_INFO = 1, 5, 12, 13  # fields of a graph
_NODE_INPUT, _NODE_OUTPUT, _NODE_ATTRIBUTE = 1, 2, 5
_SUBGRAPHS = (6, 11)  # fields of an attribute
_NAME_FIELD = {_INITIALIZER: 8, _OUTPUT: 1, _VALUE_INFO: 1}


@dataclass(frozen=True)
class _Node:
    inputs: tuple[bytes, ...]
    outputs: tuple[bytes, ...]


def without_outputs(content: bytes, dropped: Iterable[str], name: str) -> bytes:
    """Remove outputs, and everything that only they need, from an ONNX model.

    Args:
        content: bytes of the model.
        dropped: names of the outputs to remove; at least one output must remain.
        name: name of the file, for messages.

    Raises:
        Damaged: the bytes are not an ONNX model, an output does not exist, none would remain, or a node has a
            subgraph, which may read values that are not among the node's inputs.
    """
    names = {one.encode() for one in dropped}
    return b"".join(
        _encode(field, _pruned_graph(value, names, name))
        if field == _GRAPH and isinstance(value, memoryview)
        else _encode(field, value)
        for field, value in fields(memoryview(content), name)
    )


def _pruned_graph(graph: memoryview, dropped: set[bytes], name: str) -> bytes:
    parts = list(fields(graph, name))
    nodes = {
        i: _read_node(value, name)
        for i, (field, value) in enumerate(parts)
        if field == _NODE and isinstance(value, memoryview)
    }
    outputs = {_name_of(field, value, name) for field, value in parts if field == _OUTPUT}
    if not dropped < outputs:
        raise Damaged(f"{name} has the outputs {sorted(outputs)}: {sorted(dropped)} cannot be taken out")
    kept_nodes = _ancestors(nodes, outputs - dropped)
    read = (outputs - dropped).union(*(nodes[i].inputs for i in kept_nodes))
    values = read.union(*(nodes[i].outputs for i in kept_nodes))
    kept_names = {_OUTPUT: outputs - dropped, _INITIALIZER: read, _VALUE_INFO: values}
    kept = []
    for i, (field, value) in enumerate(parts):
        if field == _NODE:
            keep = i in kept_nodes
        else:
            keep = field not in kept_names or _name_of(field, value, name) in kept_names[field]
        if keep:
            kept.append(_encode(field, value))
    return b"".join(kept)


def _ancestors(nodes: Mapping[int, _Node], values: set[bytes]) -> set[int]:
    """Indices of the nodes that these values depend on."""
    producers = {value: i for i, node in nodes.items() for value in node.outputs}
    ancestors: set[int] = set()
    pending = list(values)
    while pending:
        i = producers.get(pending.pop())
        if i is not None and i not in ancestors:
            ancestors.add(i)
            pending += nodes[i].inputs
    return ancestors


def _read_node(view: memoryview, name: str) -> _Node:
    tensors: dict[int, list[bytes]] = {_NODE_INPUT: [], _NODE_OUTPUT: []}
    for field, value in fields(view, name):
        if field in tensors and isinstance(value, memoryview):
            tensors[field].append(bytes(value))
        elif field == _NODE_ATTRIBUTE and isinstance(value, memoryview) and _has_subgraph(value, name):
            raise Damaged(f"{name}: a graph whose nodes hold graphs of their own keeps all of its outputs")
    return _Node(tuple(tensors[_NODE_INPUT]), tuple(tensors[_NODE_OUTPUT]))


def _has_subgraph(attribute: memoryview, name: str) -> bool:
    return any(field in _SUBGRAPHS for field, _ in fields(attribute, name))


def _name_of(field: int, value: int | memoryview, name: str) -> bytes:
    if isinstance(value, memoryview):
        for inner, text in fields(value, name):
            if inner == _NAME_FIELD[field] and isinstance(text, memoryview):
                return bytes(text)
    return b""


def _encode(field: int, value: int | bytes | memoryview) -> bytes:
    """A protobuf field that holds an integer, or bytes."""
    if isinstance(value, int):
        return _varint(field << 3) + _varint(value)
    return _varint(field << 3 | 2) + _varint(len(value)) + bytes(value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
