"""Simulate a disk on which the n-th modifying call fails, by patching Python's calls of the system."""

from __future__ import annotations

import ctypes
import errno
import io
import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest

from mexit.errors import MexitError

MAX_CALLS = 500


class FailingDisk:
    """Counts opening for writing, write, fsync, mkdir and every kind of rename; the n-th call fails.

    Attributes:
        exchange: whether the system can exchange two names (renameat2).
        permanent: whether all calls after the n-th fail too, as on a full disk.
    """

    def __init__(self, patch: pytest.MonkeyPatch, nth: int, *, permanent: bool, exchange: bool) -> None:
        self._nth, self._permanent, self._exchange, self._calls = nth, permanent, exchange, 0
        for name in ("fsync", "mkdir", "replace", "rename"):
            patch.setattr(os, name, self._counted(getattr(os, name)))
        real_library, real_open = ctypes.CDLL, io.open
        patch.setattr(ctypes, "CDLL", lambda *args, **kwargs: _Library(real_library(*args, **kwargs), self))
        patch.setattr(io, "open", lambda *args, **kwargs: self._open(real_open, *args, **kwargs))

    @property
    def failed(self) -> bool:
        """Whether the n-th call came."""
        return self._calls >= self._nth

    @property
    def can_exchange(self) -> bool:
        return self._exchange

    def count(self) -> None:
        """Count one call and raise if it is the one to fail."""
        self._calls += 1
        if self._calls == self._nth or (self._permanent and self.failed):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count()
            return call(*args, **kwargs)

        return counted

    def _open(self, real_open: Callable[..., Any], file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wax+"):
            return real_open(file, mode, *args, **kwargs)
        self.count()
        return _TornFile(real_open(file, mode, *args, **kwargs), self)


class _Library:
    """The C library with a `renameat2` that may fail, or without one."""

    def __init__(self, library: ctypes.CDLL, disk: FailingDisk) -> None:
        self._library, self._disk = library, disk

    def __getattr__(self, name: str) -> Any:
        if name != "renameat2":
            return getattr(self._library, name)
        if not self._disk.can_exchange:
            raise AttributeError(name)

        def renameat2(*args: Any) -> int:
            try:
                self._disk.count()
            except OSError as error:
                ctypes.set_errno(error.errno or 0)
                return -1
            return int(self._library.renameat2(*args))

        return renameat2


class _TornFile:
    """A file in which a failing write leaves half of its content."""

    def __init__(self, file: Any, disk: FailingDisk) -> None:
        self._file, self._disk = file, disk

    def write(self, content: bytes) -> int:
        try:
            self._disk.count()
        except OSError:
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            raise
        return int(self._file.write(content))

    def __enter__(self) -> _TornFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def fail_each_call(
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[], object],
    check: Callable[[bool], None],
    *,
    permanent: bool = False,
    exchange: bool = True,
) -> int:
    """Run `write` with a failure at its first, second, ... modifying call, until no call fails.

    Args:
        monkeypatch: patches the calls and restores them.
        write: the code under test.
        check: called after every attempt with whether `write` succeeded; the disk works again by then.
        permanent, exchange: as in `FailingDisk`.

    Returns:
        The number of calls that failed.
    """
    for nth in itertools.count(1):
        assert nth < MAX_CALLS, "write makes more calls at every attempt"
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch, nth, permanent=permanent, exchange=exchange)
            error = None
            try:
                write()
            except MexitError as caught:
                error = caught
        if error is not None:
            assert disk.failed
            assert "No space left on device" in str(error)
        check(error is None)
        if not disk.failed:
            return nth - 1
    raise AssertionError
