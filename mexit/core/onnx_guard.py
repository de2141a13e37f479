"""Refuse ONNX files that point outside themselves, without the onnx package.

A tensor whose data lies in another file makes the loader open a path that the file names; four advisories
in four years came from there. This walks the protobuf wire format down to every tensor and looks for the
two fields that say so (`external_data` = 13, `data_location` = 14). Field numbers: onnx.proto, IR version 13.
"""

from __future__ import annotations

from collections.abc import Iterator

from mexit.errors import Damaged, Untrusted

# message -> {field number: message it holds}; fields not listed hold no tensors.
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_MAX_DEPTH = 64


def refuse_external_data(content: bytes, name: str) -> None:
    """Raise `Untrusted` if a tensor in this ONNX model lies in another file, `Damaged` if it is no protobuf."""
    _walk(memoryview(content), "model", name, 0)


def _walk(view: memoryview, message: str, name: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise Damaged(f"{name}: graphs nested deeper than {_MAX_DEPTH}")
    children = _CHILDREN.get(message, {})
    for field, value in _fields(view, name):
        if message == "tensor":
            if field == _EXTERNAL_DATA or (field == _DATA_LOCATION and value):
                raise Untrusted(
                    f"{name} keeps weights in another file (ONNX external data): export it in one file"
                )
        elif field in children and isinstance(value, memoryview):
            _walk(value, children[field], name, depth + 1)


def _fields(view: memoryview, name: str) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers with their varint or their bytes."""
    at = 0
    while at < len(view):
        key, at = _varint(view, at, name)
        if key >> 32:  # parsers keep the low 32 bits, so a field number could hide here
            raise Damaged(f"{name} is not an ONNX file")
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(view, at, name)
            yield field, value
            continue
        if wire == 2:
            size, at = _varint(view, at, name)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise Damaged(f"{name} is not an ONNX file")
        if at + size > len(view):
            raise Damaged(f"{name} is cut short")
        yield field, view[at : at + size]
        at += size


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
