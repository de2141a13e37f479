"""Default paths of runs and bundles: `runs/latest` and `bundles/latest` hold the path that was written last."""

from __future__ import annotations

import time
from pathlib import Path

from mexit.core.atomic_io import read_bytes, write_bytes
from mexit.core.bundle import MANIFEST
from mexit.core.progress import Progress
from mexit.errors import NotFound

RUNS, BUNDLES = Path("runs"), Path("bundles")
POINTER = "latest"
_COMMANDS = {RUNS: "mexit train", BUNDLES: "mexit export"}
_UNITS = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))


def remember(folder: Path, path: Path) -> None:
    """Make `path` the default of `folder`, which is `RUNS` or `BUNDLES`."""
    write_bytes(folder / POINTER, f"{path}\n".encode())


def newest(folder: Path, progress: Progress) -> Path:
    """The default run or bundle, with a note that names it. Raises `NotFound` if there is none."""
    pointer = folder / POINTER
    if not pointer.exists():
        raise NotFound(f"no {folder.name} here yet: type {_COMMANDS[folder]}, or name a directory")
    path = Path(read_bytes(pointer, "pointer", 4096).decode(errors="replace").strip())
    if not path.is_dir():
        raise NotFound(f"{pointer} names {path}, which is gone: type {_COMMANDS[folder]}, or name a directory")
    progress.note(f"using {path}, {_age(path)} old")
    return path


def free_name(folder: Path, name: str) -> Path:
    """`folder/name`, or the first of name-2, name-3, ... that does not exist."""
    path, number = folder / name, 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}"
    return path


def is_bundle(path: Path) -> bool:
    """Whether a directory is a bundle; commands take any other directory for a run."""
    return (path / MANIFEST).exists()


def _age(path: Path) -> str:
    file = path / (MANIFEST if is_bundle(path) else "settings.json")
    seconds = max(0.0, time.time() - (file if file.exists() else path).stat().st_mtime)
    unit, size = next(((unit, size) for unit, size in _UNITS if seconds >= size), _UNITS[-1])
    count = int(seconds // size)
    return f"{count} {unit}{'' if count == 1 else 's'}"
