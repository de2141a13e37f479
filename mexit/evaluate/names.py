"""Names of classes and files as a report shows them."""

from __future__ import annotations


def abbreviate(name: str, most: int) -> str:
    """A name with "..." for its middle if it has more than `most` characters; `most` is at least 5."""
    if len(name) <= most:
        return name
    kept = most - 3
    return f"{name[: kept - kept // 2]}...{name[len(name) - kept // 2 :]}"
