"""A lock on a directory: one process at a time writes it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mexit.errors import MexitError, UsageError

LOCK = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def directory_lock(folder: Path, busy: str) -> Iterator[None]:
    """Hold the lock of an existing directory: the file `.lock` with the holder's process id and host.

    The system frees the lock when its process ends in any way, so the file of a killed process blocks no other. On a
    file system without locks, nothing is locked.

    Args:
        folder: the directory.
        busy: what another holder does, for the message, such as "run x is being trained".

    Raises:
        UsageError: another process holds the lock; the message has its id and host.
        MexitError: the file cannot be written.
    """
    path = folder / LOCK
    try:
        handle = _acquire(path)
        if handle is None:
            raise UsageError(f"{busy} by {_holder(path)}: wait until it ends, or stop it first")
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())
    except OSError as error:
        raise MexitError(f"could not lock {folder}: {error.strerror}") from None
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _acquire(path: Path) -> int | None:
    """Open and lock the file; None if another process holds it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(handle)
                if isinstance(error, BlockingIOError):
                    return None
                raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # the previous holder removed the file between opening and locking


def _holder(path: Path) -> str:
    with suppress(OSError, ValueError, TypeError, KeyError):
        holder = json.loads(path.read_bytes())
        return f"process {holder['process']} on {holder['host']}"
    return "another process"
