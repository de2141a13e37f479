"""The line of each key in a TOML file, which the reader of the standard library does not tell."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

KeyPath = tuple[str | int, ...]  # names of tables and keys; the position, from 0, of a table in an array of tables
_NAME = r"[A-Za-z_\"'][\w.\-\"' ]*"
_HEADER = re.compile(rf"\s*(?P<open>\[\[?)\s*(?P<name>{_NAME}?)\s*\]\]?\s*(?:#.*)?")
_KEY = re.compile(r"\s*(?P<name>[\w-]+|\"[^\"]*\"|'[^']*')\s*[=.]")


def key_lines(text: str) -> Mapping[KeyPath, int]:
    """The lines, from 1, of tables and keys; keys of inline tables and of dotted names have the line of the first."""
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    counts: Counter[KeyPath] = Counter()
    for number, line in enumerate(text.split("\n"), start=1):
        if header := _HEADER.fullmatch(line):
            table = tuple(part.strip(" \"'") for part in header["name"].split("."))
            if header["open"] == "[[":
                counts[table] += 1
                table = (*table, counts[table] - 1)
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            lines.setdefault((*table, key["name"].strip("\"'")), number)
    return lines


def line_of(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    """The line of a key, or of the innermost table around it that has a line; 1 without any."""
    for length in range(len(path), 0, -1):
        if (line := lines.get(path[:length])) is not None:
            return line
    return 1
