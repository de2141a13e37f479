"""What is at a path, or beside it, where something else is expected; for messages."""

from __future__ import annotations

import difflib
from contextlib import suppress
from pathlib import Path

RUN, BUNDLE = "run", "bundle"
_FILES = {RUN: "settings.json", BUNDLE: "bundle.json"}


def found_instead(path: Path, expected: str) -> str | None:
    """A sentence on what a path is instead of a run or a bundle.

    Args:
        path: an existing path.
        expected: `RUN` or `BUNDLE`.

    Returns:
        The sentence with what to type next; None if the path is a directory that may be what is expected.
    """
    if path.is_file():
        onnx = "; mexit exports its own runs and does not read ONNX files" if path.suffix.lower() == ".onnx" else ""
        return f"{path} is a file, the directory of a {expected} is expected{onnx}"
    (other,) = _FILES.keys() - {expected}
    if (path / _FILES[other]).exists() and not (path / _FILES[expected]).exists():
        hint = "mexit export makes a bundle of it" if other == RUN else "name the run that it was exported from"
        return f"{path} is a {other}, a {expected} is expected: {hint}"
    return None


def similar_beside(path: Path) -> str:
    """`, did you mean runs/signs?` with an entry of the same folder whose name is similar; empty without one."""
    with suppress(OSError):
        if near := difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], 1):
            return f", did you mean {path.with_name(near[0])}?"
    return ""
