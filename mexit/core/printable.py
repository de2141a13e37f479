"""Show texts from outside, such as file names, in terminals and JSON; shorten lists of them."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

# Control characters, which terminals interpret, and what Python reads bytes that are not UTF-8 as.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


def printable(text: str) -> str:
    r"""A text on one line: control characters and bytes that are not UTF-8 as `\x1b` and `\xe9`."""
    return text if text.isprintable() else UNPRINTABLE.sub(_escape, text)


def printable_lines(text: str) -> str:
    """A text with its line breaks, each line as `printable` shows it."""
    return text if text.isprintable() else "\n".join(map(printable, text.split("\n")))


def listed(items: Sequence[T], most: int = 5, show: Callable[[T], str] = str, separator: str = ", ") -> str:
    """The first `most` items as `show` gives them, and how many more there are: `a, b and 3 more`."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return separator.join(map(show, items[:most])) + more


def shell_path(path: str | os.PathLike[str]) -> str:
    r"""A path, or another argument with a path in it, as it is typed in a shell.

    Spaces and special characters are quoted, unprintable bytes are written as `$'\xe9'`, and `./` goes before a leading
    dash, which would begin an option.
    """
    text = os.fspath(path)
    text = f"./{text}" if text.startswith("-") else text
    if text.isprintable():
        return shlex.quote(text)
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{UNPRINTABLE.sub(_escape_bytes, quoted)}'"


def json_text(value: Any, *, ascii_only: bool = True, indent: int | None = None, allow_nan: bool = False) -> str:
    r"""JSON text that every reader takes: bytes that are not UTF-8 become the text `\xe9`, not half a character.

    Args:
        value: the value to store.
        ascii_only: whether to escape all but ASCII, for terminals of any encoding.
        indent: spaces per level; None = one line.
        allow_nan: whether to write numbers that are not finite as `NaN` and `Infinity`, which is not JSON.

    Raises:
        ValueError: a number is not finite, and `allow_nan` is False.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=allow_nan)
    text = _SURROGATE.sub(lambda found: f"\\{_escape(found)}", text)
    return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text) if ascii_only else text


def _escape_bytes(found: re.Match[str]) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(found[0]))


def _escape(found: re.Match[str]) -> str:
    return f"\\x{ord(found[0]) & 0xFF:02x}"
