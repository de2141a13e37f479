"""Decode JSON into frozen dataclasses with strict type checks; errors name the field.

decode({"n": 5}, SplitSpec, "bundle.json")  ->  Damaged: bundle.json: missing sha256
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from mexit.errors import Damaged, SchemaTooNew

# Frontiers have hundreds of points, and resolving the types of one takes longer than decoding it.
_type_hints = lru_cache(maxsize=None)(get_type_hints)


def check_format(value: Any, expected: str, version: int, where: str) -> None:
    """Check the fields `format` and `version` of a mexit JSON file.

    Args:
        value: the parsed file.
        expected: the format.
        version: the newest version that this mexit reads.
        where: the file, for messages.

    Raises:
        Damaged: it is another format, or the version is not a positive integer.
        SchemaTooNew: the version is newer.
    """
    if not isinstance(value, dict) or value.get("format") != expected:
        actual = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise Damaged(f"{where}: expected format '{expected}', found {actual!r}")
    actual_version = value.get("version")
    if type(actual_version) is not int or actual_version < 1:
        raise Damaged(f"{where}: version must be a positive whole number, found {actual_version!r}")
    if actual_version > version:
        raise SchemaTooNew(
            f"{where}: version {actual_version} is newer than this mexit reads ({version}): upgrade mexit, or export "
            "the bundle again with this one"
        )


def decode(value: Any, kind: Any, where: str) -> Any:
    """Convert parsed JSON to the type `kind`.

    Unknown fields of objects are ignored. A field that older files lack is declared with the default None.

    Args:
        value: parsed JSON.
        kind: a dataclass, `bool`, `int`, `float`, `str`, `Any`, or a tuple, mapping or optional of these.
        where: path of the value in messages, such as `bundle.json.input`.

    Raises:
        Damaged: the value has another type, or a field is missing.
    """
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(value, kind, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        choices = [choice for choice in arguments if choice is not type(None)]
        return None if value is None and len(choices) < len(arguments) else decode(value, choices[0], where)
    if origin is tuple:
        return _decode_tuple(value, arguments, where)
    if origin is not None and issubclass(origin, Mapping):
        return {key: decode(item, arguments[1], f"{where}.{key}") for key, item in _object(value, where).items()}
    if kind is Any:
        return value
    # A JSON integer is a valid float, but true and false are not integers.
    if not isinstance(value, (int, float) if kind is float else kind) or (type(value) is bool and kind is not bool):
        raise Damaged(f"{where}: expected {kind.__name__}, found {value!r}")
    return float(value) if kind is float else value


def _decode_dataclass(value: Any, kind: Any, where: str) -> Any:
    entries = _object(value, where)
    hints = _type_hints(kind)
    fields = dataclasses.fields(kind)
    missing = [field.name for field in fields if field.name not in entries and field.default is not None]
    if missing:
        raise Damaged(f"{where}: missing {', '.join(missing)}")
    names = [field.name for field in fields if field.name in entries]
    return kind(**{name: decode(entries[name], hints[name], f"{where}.{name}") for name in names})


def _decode_tuple(value: Any, kinds: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise Damaged(f"{where}: expected a list, found {value!r}")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(value) != len(kinds):
        raise Damaged(f"{where}: expected {len(kinds)} entries, found {len(value)}")
    return tuple(decode(item, kind, f"{where}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True)))


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Damaged(f"{where}: expected an object, found {value!r}")
    return value
