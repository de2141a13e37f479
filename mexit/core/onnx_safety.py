"""Refuses ONNX files that refer to other files. It reads the protobuf wire format itself, without the onnx package.

A tensor with external data makes the loader open a path that the file names; four security advisories in four years
were about that. `refuse_external_data` looks in every tensor for the two fields that mark external data. Field
numbers are those of onnx.proto, IR version 13.
"""

from __future__ import annotations

from collections.abc import Iterator

from mexit.errors import Damaged, Untrusted

# For each message, the fields that hold messages with tensors, and the class of these messages.
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # fields of a tensor
_MAX_DEPTH = 64


def refuse_external_data(content: bytes, name: str) -> None:
    """Check the bytes of an ONNX model; `name` is the file's name in messages.

    Raises:
        Untrusted: a tensor is stored in another file.
        Damaged: the bytes are not a protobuf message.
    """
    _check(memoryview(content), "model", name, 0)


def fields(view: memoryview, name: str) -> Iterator[tuple[int, int | memoryview]]:
    """Read a protobuf message.

    Args:
        view: bytes of the message, which need not be trusted.
        name: name of the file, for messages.

    Yields:
        The number of each field, and its integer (wire type 0) or its bytes (wire types 1, 2 and 5).

    Raises:
        Damaged: the bytes are not a protobuf message.
    """
    at = 0
    while at < len(view):
        key, at = _varint(view, at, name)
        if key >> 32:  # parsers keep the low 32 bits, so the number of a field could be hidden
            raise Damaged(f"{name} is not an ONNX file")
        field, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, at = _varint(view, at, name)
            yield field, value
            continue
        if wire_type == 2:
            size, at = _varint(view, at, name)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise Damaged(f"{name} is not an ONNX file")
        if at + size > len(view):
            raise Damaged(f"{name} is cut short")
        yield field, view[at : at + size]
        at += size


def _check(view: memoryview, message: str, name: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise Damaged(f"{name}: graphs nested deeper than {_MAX_DEPTH}")
    children = _CHILDREN.get(message, {})
    for field, value in fields(view, name):
        if message == "tensor":
            if field == _EXTERNAL_DATA or (field == _DATA_LOCATION and value):
                raise Untrusted(f"{name} keeps weights in another file (ONNX external data): export it in one file")
        elif field in children and isinstance(value, memoryview):
            _check(value, children[field], name, depth + 1)


def _varint(view: memoryview, at: int, name: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            raise Damaged(f"{name} is cut short")
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise Damaged(f"{name} is not an ONNX file")
