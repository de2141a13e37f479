"""Read files with limits and clear errors; write files and directories atomically and durably.

`write_bytes` (a file) and `new_directory` (an artifact) write to a hidden temporary name in the same directory, fsync,
rename, and fsync the directory. A crash leaves at most a hidden temporary, which the next write to the same name
removes. Where the system cannot exchange two names, a crash between two renames leaves the old directory as
`.NAME.old-PID`.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import io
import json
import os
import shutil
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.printable import json_text
from mexit.errors import Damaged, MexitError, NotFound, UsageError

CHUNK_BYTES = 1 << 20
MAX_JSON_BYTES = 64 << 20
# Constants of Linux's renameat2.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def sha256_bytes(content: bytes) -> str:
    """The sha256 in lower-case hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """The sha256 of a file in lower-case hexadecimal. Raises `NotFound`, `Damaged`."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise _read_error("file", path, error) from None
    return digest.hexdigest()


def to_json(value: Any) -> bytes:
    """JSON as mexit stores it: indented, keys in the given order, without NaN and infinity."""
    return (json_text(value, ascii_only=False, indent=1) + "\n").encode()


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file; messages call it `what`. Raises `NotFound`, `Damaged`."""
    return parse_json(read_bytes(path, what, MAX_JSON_BYTES), path, what)


def parse_json(content: bytes, path: Path, what: str) -> Any:
    """Parse the content of the JSON file `path`; messages call it `what`. Raises `Damaged`."""
    try:
        value = json.loads(content, parse_constant=_parse_float, parse_float=_parse_float, parse_int=_parse_int)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate could not be stored again
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{what} {path} is not valid JSON ({error})") from None
    return value


def _parse_float(text: str) -> float:
    value = float(text)
    if not np.isfinite(value):
        raise ValueError(f"the number {text[:40]} is not finite")
    return value


def _parse_int(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"the number {text[:40]} is out of range")
    return value


def read_bytes(path: Path, what: str, limit: int, *, too_large: type[MexitError] = Damaged) -> bytes:
    """Read a file.

    Args:
        path: the file.
        what: how messages call it.
        limit: maximum size in bytes.
        too_large: class of the error for a larger file.

    Raises:
        NotFound: the file does not exist.
        Damaged: it is not a regular file, or cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would block, reading a device would not end
            raise Damaged(f"{what} {path} is not a file")
        if status.st_size > limit:
            raise too_large(f"{what} {path} has {status.st_size} bytes; at most {limit} are expected")
        return path.read_bytes()
    except OSError as error:
        raise _read_error(what, path, error) from None


def _read_error(what: str, path: Path, error: OSError) -> MexitError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NotFound(f"{what} {path} does not exist")
    return Damaged(f"{what} {path} cannot be read: {error.strerror}")


def to_npz(**entries: NDArray[Any] | Mapping[str, str]) -> bytes:
    """A compressed npz file of arrays; a mapping becomes its JSON text as uint8."""
    buffer = io.BytesIO()
    arrays = {
        name: np.frombuffer(json.dumps(entry).encode(), np.uint8) if isinstance(entry, Mapping) else entry
        for name, entry in entries.items()
    }
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def read_npz(content: bytes, limit: int) -> dict[str, NDArray[Any]]:
    """Read the arrays of an npz file. Raises `ValueError` if damaged, pickled or unpacking to over `limit` bytes."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > limit:
            raise ValueError(f"it unpacks to {unpacked} bytes; at most {limit} are expected")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and numpy raise many exceptions on damaged files
        raise ValueError(str(error) or type(error).__name__) from None


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically and durably. Raises `MexitError` with the reason if a write fails."""
    with _temporary(path) as temporary:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextmanager
def new_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the block ends without an error.

    Raises:
        UsageError: `path` exists and `replace` is false.
        MexitError: a write fails; nothing is left behind.
    """
    _refuse_existing(path, replace)
    with _temporary(path) as temporary:
        temporary.mkdir()
        yield temporary
        for folder in sorted({file.parent for file in temporary.rglob("*")} | {temporary}):
            sync_path(folder)
        _refuse_existing(path, replace)  # another process may have made it meanwhile
        _move_into_place(temporary, path)


def _refuse_existing(path: Path, replace: bool) -> None:
    if path.exists() and not replace:
        raise UsageError(f"{path} exists already: choose another name with --out, or add --replace")


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`. The block writes it and renames it, which is then made durable."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
            yield temporary
        except OSError as error:
            reason = error.strerror or error
            raise MexitError(f"could not write {path}: {reason}; what was there before is untouched") from error
        try:
            sync_path(path.parent)
        except OSError as error:
            reason = error.strerror or error
            raise MexitError(f"{path} was written, but may not survive a power failure: {reason}") from error
    finally:
        _remove(temporary)


def _remove_leftovers(path: Path) -> None:
    """Remove the temporaries of processes that were killed."""
    for kind in ("tmp", "old") if path.exists() else ("tmp",):
        for leftover in path.parent.glob(glob.escape(f".{path.name}.{kind}-") + "*"):
            process = leftover.name.rpartition("-")[2]
            if process.isdigit() and not _is_other_process(int(process)):
                _remove(leftover)


def _is_other_process(process: int) -> bool:
    """Whether another process with this id is running."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def sync_path(path: Path) -> None:
    """Make the content of a file, or the names in a directory, durable. Raises `OSError`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move_into_place(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; if `path` exists, exchange the names or move it aside first."""
    if not path.exists():
        os.rename(temporary, path)
    elif not _exchange(temporary, path):
        aside = path.with_name(f".{path.name}.old-{os.getpid()}")
        os.rename(path, aside)
        try:
            os.rename(temporary, path)
        except OSError:
            os.rename(aside, path)
            raise
        _remove(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically with Linux's renameat2; False if the system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _remove(path: Path) -> None:
    """Remove a file or directory; ignore failures, which must not hide how the write itself ended."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
