"""Writing so that a file or directory is the old one or the new one, never a torn one.

Everything mexit stores goes through `write_bytes` (one file) or `new_directory` (a whole artifact): a
hidden temporary name in the same directory, fsync, rename, fsync of the directory. A crash leaves at most
a hidden temporary, which the next write to the same name removes. (Where the system cannot swap two names, a
crash between two renames leaves the old directory as `.NAME.old-PID`.)
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.errors import Damaged, MexitError, NotFound, UsageError

CHUNK_BYTES = 1 << 20
MAX_JSON_BYTES = 64 << 20
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def sha256_bytes(content: bytes) -> str:
    """Lower-case hexadecimal sha256."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """Lower-case hexadecimal sha256 of a file, read in chunks. Raises `NotFound`, `Damaged`."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise _unreadable("file", path, error) from None
    return digest.hexdigest()


def to_json(value: Any) -> bytes:
    """JSON as mexit stores it: indented, keys in the given order, no NaN or infinity."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file; `what` names it in the message of `NotFound` or `Damaged`."""
    return parse_json(read_bytes(path, what, MAX_JSON_BYTES), path, what)


def parse_json(content: bytes, path: Path, what: str) -> Any:
    """Parse JSON that was read from `path`."""
    try:
        value = json.loads(content, parse_constant=_finite, parse_float=_finite, parse_int=_whole)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair could never be stored again
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{what} {path} is not valid JSON ({error})") from None
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not np.isfinite(value):
        raise ValueError(f"the number {text[:40]} is not finite")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"the number {text[:40]} is out of range")
    return value


def read_bytes(path: Path, what: str, limit: int, *, too_large: type[MexitError] = Damaged) -> bytes:
    """The content of a file that must exist and hold at most `limit` bytes. Raises `NotFound`, `Damaged`."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would block, a device never end
            raise Damaged(f"{what} {path} is not a file")
        if found.st_size > limit:
            raise too_large(f"{what} {path} has {found.st_size} bytes; at most {limit} are expected")
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(what, path, error) from None


def _unreadable(what: str, path: Path, error: OSError) -> MexitError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NotFound(f"{what} {path} does not exist")
    return Damaged(f"{what} {path} cannot be read: {error.strerror}")


def read_npz(content: bytes, limit: int) -> dict[str, NDArray[Any]]:
    """The arrays of an npz file. Raises `ValueError` if it is damaged, pickled or unpacks to more than `limit`."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > limit:
            raise ValueError(f"it unpacks to {unpacked} bytes; at most {limit} are expected")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and numpy raise many kinds on damaged files
        raise ValueError(str(error) or type(error).__name__) from None


def write_bytes(path: Path, content: bytes) -> None:
    """Put `content` at `path` atomically and durably. Raises `MexitError` with the reason if it cannot."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _clear_leftovers(path)
            _write_synced(temporary, content)
            os.replace(temporary, path)
        except OSError as error:
            raise _write_failed(path, error) from error
        _settle(path)
    finally:
        _remove(temporary)


@contextmanager
def new_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the block ends without an error.

    Raises:
        UsageError: `path` exists and `replace` is false.
        MexitError: the file system refuses a write; nothing is left behind.
    """
    if path.exists() and not replace:
        raise UsageError(f"{path} exists already: choose another name with --out, or add --replace")
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _clear_leftovers(path)
            temporary.mkdir()
            yield temporary
            for folder in sorted({file.parent for file in temporary.rglob("*")} | {temporary}):
                _sync_directory(folder)
            _move_into_place(temporary, path)
        except OSError as error:
            raise _write_failed(path, error) from error
        _settle(path)
    finally:
        _remove(temporary)


def _clear_leftovers(path: Path) -> None:
    """Temporaries of writers that no longer live (`kill -9`)."""
    for kind in ("tmp", "old") if path.exists() else ("tmp",):
        for leftover in path.parent.glob(glob.escape(f".{path.name}.{kind}-") + "*"):
            process = leftover.name.rpartition("-")[2]
            if process.isdigit() and not _alive(int(process)):
                _remove(leftover)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _settle(path: Path) -> None:
    """Make a finished rename durable."""
    try:
        _sync_directory(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise MexitError(f"{path} was written, but may not survive a power failure: {reason}") from error


def _move_into_place(temporary: Path, path: Path) -> None:
    """Rename, or swap in one step where `path` exists; afterwards `temporary` holds the old one, if any."""
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
    """Swap two names atomically (Linux `renameat2`); False where the system cannot."""
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
    """Tidy up as far as the system lets us; whether it did must not hide how the write itself went."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _write_failed(path: Path, error: OSError) -> MexitError:
    return MexitError(f"could not write {path}: {error.strerror or error}; what was there before is untouched")
