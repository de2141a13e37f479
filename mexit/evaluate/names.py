"""Names of classes and files as a report shows them."""

from __future__ import annotations

import re

_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(name: str) -> str:
    r"""A file name with control characters and bytes that are no UTF-8 written as escapes such as \n and \xff."""

    def escape(match: re.Match[str]) -> str:
        code = ord(match[0])
        if 0xDC80 <= code <= 0xDCFF:  # Python's form of a byte that it cannot decode
            return f"\\x{code - 0xDC00:02x}"
        return match[0].encode("unicode_escape").decode()

    return _UNSAFE.sub(escape, name)


def abbreviate(name: str, most: int) -> str:
    """A name with "..." for its middle if it has more than `most` characters; `most` is at least 5."""
    if len(name) <= most:
        return name
    kept = most - 3
    return f"{name[: kept - kept // 2]}...{name[len(name) - kept // 2 :]}"
