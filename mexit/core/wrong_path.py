"""What is at a path where a run or a bundle is expected, for messages."""

from __future__ import annotations

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
