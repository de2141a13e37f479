"""Default paths of runs and bundles: `runs/latest` and `bundles/latest` hold the path that was written last."""

from __future__ import annotations

import itertools
import os
import re
import time
import unicodedata
from contextlib import suppress
from pathlib import Path

from mexit.core.atomic_io import read_bytes, write_bytes
from mexit.core.bundle import MANIFEST
from mexit.core.progress import Progress
from mexit.errors import MexitError, NotFound

RUNS, BUNDLES = Path("runs"), Path("bundles")
POINTER = "latest"
_COMMANDS = {RUNS: "mexit train", BUNDLES: "mexit export"}
_UNITS = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))


def remember(folder: Path, path: Path) -> Path | None:
    """Make `path` the default of `folder`, which is `RUNS` or `BUNDLES`. Returns the default before."""
    pointer = folder / POINTER
    previous = _read_pointer(pointer) if pointer.is_file() else None
    write_bytes(pointer, os.fsencode(path) + b"\n")
    return previous


def forget(folder: Path, path: Path, previous: Path | None) -> None:
    """Make `previous` the default of `folder` again if `path` is the default now; None = no default."""
    pointer = folder / POINTER
    if not pointer.is_file() or _read_pointer(pointer) != path:
        return
    with suppress(OSError, MexitError):  # the pointer alone does not decide how a command ends
        if previous is None:
            pointer.unlink()
        else:
            remember(folder, previous)


def newest(folder: Path, progress: Progress) -> Path:
    """The default run or bundle, with a note that names it. Raises `NotFound` if there is none."""
    pointer = folder / POINTER
    if not pointer.exists():
        raise NotFound(f"no {folder.name} here yet: type {_COMMANDS[folder]}, or name a directory")
    path = _read_pointer(pointer)
    if not path.is_dir():
        raise NotFound(f"{pointer} names {path}, which is gone: type {_COMMANDS[folder]}, or name a directory")
    progress.note(f"using {path}, {_age(path)} old")
    return path


def plain_name(text: str) -> str:
    """The text with only characters that the name of a bundle can have, at most 50 of them."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", ascii_text).lstrip("._-")[:50] or "pictures"


def create_free(folder: Path, name: str) -> Path:
    """Create the directory `folder/name`, or the first of name-2, name-3, ... that does not exist.

    Processes that do so at the same moment get different directories. Raises `MexitError` if none can be created.
    """
    for number in itertools.count(1):
        path = folder / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except OSError as error:
            if not (isinstance(error, FileExistsError) and os.path.lexists(path)):
                raise MexitError(f"could not create {path}: {error.strerror}") from None
    raise AssertionError


def is_bundle(path: Path) -> bool:
    """Whether a directory is a bundle; commands take any other directory for a run."""
    return (path / MANIFEST).exists()


def _read_pointer(pointer: Path) -> Path:
    return Path(os.fsdecode(read_bytes(pointer, "pointer", 4096).strip()))


def _age(path: Path) -> str:
    file = path / (MANIFEST if is_bundle(path) else "settings.json")
    seconds = max(0.0, time.time() - (file if file.exists() else path).stat().st_mtime)
    unit, size = next(((unit, size) for unit, size in _UNITS if seconds >= size), _UNITS[-1])
    count = int(seconds // size)
    return f"{count} {unit}{'' if count == 1 else 's'}"
