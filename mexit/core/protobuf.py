"""The protobuf wire format, as far as ONNX files need it: no package, no schema, nothing is trusted."""

from __future__ import annotations

from collections.abc import Iterator

from mexit.errors import Damaged


def fields(view: memoryview, name: str) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message: their numbers, with their varint or their bytes.

    Args:
        view: the message.
        name: of the file, for errors.

    Raises:
        Damaged: it is no protobuf message.
    """
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


def encode(number: int, content: bytes) -> bytes:
    """One field that holds bytes: a string, or a message."""
    return _varint_bytes(number << 3 | 2) + _varint_bytes(len(content)) + content


def encode_varint(number: int, value: int) -> bytes:
    """One field that holds a whole number."""
    return _varint_bytes(number << 3) + _varint_bytes(value)


def _varint_bytes(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
