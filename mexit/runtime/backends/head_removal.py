"""Leave the head out of an ONNX segment, without the onnx package.

Engines run every node of a graph, also those that nobody reads. So the nodes and weights that only a dropped
output needs are taken out of the file's bytes, and the rest stays as it is. Field numbers: onnx.proto, IR 13.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mexit.core.protobuf import encode, encode_varint, fields
from mexit.errors import Damaged

_GRAPH = 7  # of a model
_NODE, _INITIALIZER, _OUTPUT, _VALUE_INFO = 1, 5, 12, 13  # of a graph
_NODE_INPUT, _NODE_OUTPUT, _NODE_ATTRIBUTE = 1, 2, 5
_SUBGRAPHS = (6, 11)  # of an attribute
_NAMED_BY = {_INITIALIZER: 8, _OUTPUT: 1, _VALUE_INFO: 1}  # the field that holds the name

_Field = tuple[int, "int | memoryview"]


@dataclass(frozen=True)
class _Node:
    inputs: tuple[bytes, ...]
    outputs: tuple[bytes, ...]


def without_outputs(content: bytes, dropped: Iterable[str], name: str) -> bytes:
    """The same ONNX model without some outputs, and without whatever only they need.

    Args:
        content: of the file.
        dropped: names of the outputs to take out; another one must stay.
        name: of the file, for errors.

    Raises:
        Damaged: it is no ONNX file, has no such output, nothing would be left, or a node holds graphs of its own,
            which may read values that the node does not list.
    """
    names = {one.encode() for one in dropped}
    return b"".join(
        encode(number, _prune(value, names, name))
        if number == _GRAPH and isinstance(value, memoryview)
        else _copy(number, value)
        for number, value in fields(memoryview(content), name)
    )


def _prune(graph: memoryview, dropped: set[bytes], name: str) -> bytes:
    parts = list(fields(graph, name))
    nodes = {
        place: _node(value, name)
        for place, (number, value) in enumerate(parts)
        if number == _NODE and isinstance(value, memoryview)
    }
    outputs = {_name_of(number, value, name) for number, value in parts if number == _OUTPUT}
    if not dropped < outputs:
        raise Damaged(f"{name} has the outputs {sorted(outputs)}: {sorted(dropped)} cannot be taken out")
    kept = _needed(nodes, outputs - dropped)
    read = (outputs - dropped).union(*(nodes[place].inputs for place in kept))
    made = read.union(*(nodes[place].outputs for place in kept))
    named = {_OUTPUT: outputs - dropped, _INITIALIZER: read, _VALUE_INFO: made}
    return b"".join(
        _copy(number, value)
        for place, (number, value) in enumerate(parts)
        if (
            place in kept
            if number == _NODE
            else number not in named or _name_of(number, value, name) in named[number]
        )
    )


def _needed(nodes: Mapping[int, _Node], wanted: set[bytes]) -> set[int]:
    """Places of the nodes that these values depend on."""
    maker = {value: place for place, node in nodes.items() for value in node.outputs}
    kept: set[int] = set()
    todo = list(wanted)
    while todo:
        place = maker.get(todo.pop())
        if place is not None and place not in kept:
            kept.add(place)
            todo += nodes[place].inputs
    return kept


def _node(view: memoryview, name: str) -> _Node:
    sides: dict[int, list[bytes]] = {_NODE_INPUT: [], _NODE_OUTPUT: []}
    for number, value in fields(view, name):
        if number in sides and isinstance(value, memoryview):
            sides[number].append(bytes(value))
        elif number == _NODE_ATTRIBUTE and isinstance(value, memoryview) and _holds_graph(value, name):
            raise Damaged(f"{name}: a graph whose nodes hold graphs of their own keeps all of its outputs")
    return _Node(tuple(sides[_NODE_INPUT]), tuple(sides[_NODE_OUTPUT]))


def _holds_graph(attribute: memoryview, name: str) -> bool:
    return any(number in _SUBGRAPHS for number, _ in fields(attribute, name))


def _name_of(number: int, value: int | memoryview, name: str) -> bytes:
    if isinstance(value, memoryview):
        for inner, text in fields(value, name):
            if inner == _NAMED_BY[number] and isinstance(text, memoryview):
                return bytes(text)
    return b""


def _copy(number: int, value: int | memoryview) -> bytes:
    return encode(number, bytes(value)) if isinstance(value, memoryview) else encode_varint(number, value)
