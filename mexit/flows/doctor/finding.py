"""What a check says: what was found, how bad that is, and what to type."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of `mexit doctor`.

    Attributes:
        name: of what was looked at.
        status: "ok", "warning" (it works, but not as well as it could) or "problem".
        found: in words.
        fix: what to type or set; empty where there is nothing to do.
    """

    name: str
    status: str
    found: str
    fix: str = ""


def ok(name: str, found: str, fix: str = "") -> Finding:
    """Nothing to worry about; `fix` says how to have more."""
    return Finding(name, "ok", found, fix)


def warning(name: str, found: str, fix: str) -> Finding:
    """It works, but slower, less exactly or less safely than it could."""
    return Finding(name, "warning", found, fix)


def problem(name: str, found: str, fix: str) -> Finding:
    """Something does not work."""
    return Finding(name, "problem", found, fix)
