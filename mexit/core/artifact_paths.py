"""What a command takes when nothing is named: the newest run or bundle, by pointer file, never by guess.

`runs/latest` and `bundles/latest` hold the path that was written last.
"""

from __future__ import annotations

import time
from pathlib import Path

from mexit.core.atomic_io import read_bytes, write_bytes
from mexit.core.bundle import MANIFEST
from mexit.core.progress import Progress
from mexit.errors import NotFound

RUNS, BUNDLES = Path("runs"), Path("bundles")
POINTER = "latest"
_MADE_BY = {RUNS: "mexit train", BUNDLES: "mexit export"}


def remember(folder: Path, path: Path) -> None:
    """Point the folder's default at `path`."""
    write_bytes(folder / POINTER, f"{path}\n".encode())


def newest(folder: Path, progress: Progress) -> Path:
    """The default of `RUNS` or `BUNDLES`, said aloud. Raises `NotFound` with what to type."""
    pointer = folder / POINTER
    if not pointer.exists():
        raise NotFound(f"no {folder.name} here yet: type {_MADE_BY[folder]}, or name a directory")
    path = Path(read_bytes(pointer, "pointer", 4096).decode(errors="replace").strip())
    if not path.is_dir():
        raise NotFound(f"{pointer} names {path}, which is gone: type {_MADE_BY[folder]}, or name a directory")
    progress.note(f"using {path}, {_age(path)} old")
    return path


def free_name(folder: Path, name: str) -> Path:
    """`folder`/`name`, or the first of name-2, name-3, ... that does not exist."""
    path, number = folder / name, 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}"
    return path


def is_bundle(path: Path) -> bool:
    """Whether a directory is a bundle (else it is taken for a run)."""
    return (path / MANIFEST).exists()


def _age(path: Path) -> str:
    written = path / (MANIFEST if is_bundle(path) else "settings.json")
    seconds = max(0.0, time.time() - (written if written.exists() else path).stat().st_mtime)
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        count = int(seconds // size)
        if count or unit == "second":
            return f"{count} {unit}{'' if count == 1 else 's'}"
    raise AssertionError
