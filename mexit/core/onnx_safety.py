"""Refuse ONNX files that point outside themselves, without the onnx package.

A tensor whose data lies in another file makes the loader open a path that the file names; four advisories
in four years came from there. This walks the protobuf wire format down to every tensor and looks for the
two fields that say so (`external_data` = 13, `data_location` = 14). Field numbers: onnx.proto, IR version 13.
"""

from __future__ import annotations

from mexit.core.protobuf import fields
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
    for field, value in fields(view, name):
        if message == "tensor":
            if field == _EXTERNAL_DATA or (field == _DATA_LOCATION and value):
                raise Untrusted(
                    f"{name} keeps weights in another file (ONNX external data): export it in one file"
                )
        elif field in children and isinstance(value, memoryview):
            _walk(value, children[field], name, depth + 1)
