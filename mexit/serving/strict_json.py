"""JSON from strangers: bounded before it is parsed, and without what JSON does not have.

Python's parser takes `NaN`, `Infinity`, repeated keys, UTF-16 and any depth or length; here each is `BadInput`.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

import numpy as np

from mexit.errors import BadInput, TooLarge
from mexit.serving.limits import Limits

_BLOCK_BYTES = 1 << 20
_DEEPER = np.zeros(256, np.int8)
_DEEPER[[ord("["), ord("{")]], _DEEPER[[ord("]"), ord("}")]] = 1, -1
_STARTS_VALUE = np.zeros(256, np.bool_)
_STARTS_VALUE[[ord("["), ord("{"), ord(",")]] = True


def parse(content: bytes, limits: Limits) -> Any:
    """Parse UTF-8 JSON. Raises `BadInput` with the reason, `TooLarge` for more values than the limit."""
    _check_size(content, limits)
    try:
        text = content.decode("utf-8")
        return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise BadInput(f"the JSON is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise BadInput(f"not valid JSON: {error}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits
        raise BadInput("not valid JSON: a number or a nesting that no reader takes") from None


def shown(value: object) -> str:
    """What a client sent, short enough to send back."""
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {_kind(value)}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_size(content: bytes, limits: Limits) -> None:
    """Bound depth and values by counting brackets and commas, those inside strings included."""
    codes = np.frombuffer(content, np.uint8)
    depth = deepest = values = 0
    for start in range(0, len(codes), _BLOCK_BYTES):
        block = codes[start : start + _BLOCK_BYTES]
        running = np.cumsum(_DEEPER[block], dtype=np.int32)
        deepest = max(deepest, depth + int(running.max()))
        depth += int(running[-1])
        values += int(np.count_nonzero(_STARTS_VALUE[block]))
        if deepest > limits.json_depth:
            raise BadInput(f"the JSON is nested deeper than {limits.json_depth} levels")
        if values > limits.json_values:
            raise TooLarge(f"the JSON holds more than {limits.json_values} values: send binary tensors instead")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadInput(f"the JSON names the key {shown(twice)} twice")
    return entries


def _refuse_constant(name: str) -> NoReturn:
    raise BadInput(f"not valid JSON: {name}")


def _kind(value: object) -> str:
    return "JSON object" if isinstance(value, dict) else "JSON list"
