"""Writing so that a file or directory is the old one or the new one, never a torn one.

Everything mexit stores goes through `write_bytes` (one file) or `new_directory` (a whole artifact): a
hidden temporary name in the same directory, fsync, rename, fsync of the directory. A crash leaves at most
a hidden temporary, which the next write to the same name removes.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mexit.errors import Damaged, MexitError, NotFound, UsageError

CHUNK_BYTES = 1 << 20
MAX_JSON_BYTES = 64 << 20
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def sha256_bytes(content: bytes) -> str:
    """Lower-case hexadecimal sha256."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """Lower-case hexadecimal sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
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
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{what} {path} is not valid JSON ({error})") from None


def read_bytes(path: Path, what: str, limit: int) -> bytes:
    """The content of a file that must exist and hold at most `limit` bytes."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise Damaged(f"{what} {path} has {size} bytes; at most {limit} are expected")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{what} {path} does not exist") from None
    except OSError as error:
        raise Damaged(f"{what} {path} cannot be read: {error.strerror}") from None


def write_bytes(path: Path, content: bytes) -> None:
    """Put `content` at `path` atomically and durably. Raises `MexitError` with the reason if it cannot."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_synced(temporary, content)
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise _write_failed(path, error) from error
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
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(path)
        temporary.mkdir()
        yield temporary
        for folder in sorted({file.parent for file in temporary.rglob("*")} | {temporary}):
            _sync_directory(folder)
        _move_into_place(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise _write_failed(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _clear_leftovers(path: Path) -> None:
    """Temporaries of writers that no longer live (`kill -9`)."""
    for leftover in path.parent.glob(f".{path.name}.tmp-*"):
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


def _move_into_place(temporary: Path, path: Path) -> None:
    """Rename, or swap in one step where `path` exists; afterwards `temporary` holds the old one, if any."""
    if not path.exists():
        os.rename(temporary, path)
    elif not _exchange(temporary, path):
        aside = path.with_name(f".{path.name}.old-{os.getpid()}")
        os.rename(path, aside)
        os.rename(temporary, path)
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
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _write_failed(path: Path, error: OSError) -> MexitError:
    return MexitError(f"could not write {path}: {error.strerror or error}; what was there before is untouched")
