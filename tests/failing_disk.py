"""A disk that fails at the N-th call that changes it, patched where Python meets the system."""

from __future__ import annotations

import errno
import io
import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest

from mexit.core import atomic_io
from mexit.errors import MexitError

MANY = 500


class FailingDisk:
    """Counts opening for writing, write, fsync, mkdir and every kind of rename; one of them strikes.

    Attributes:
        struck: whether the N-th call came.
    """

    def __init__(self, patch: pytest.MonkeyPatch, nth: int, *, for_good: bool) -> None:
        self._nth, self._for_good, self._calls = nth, for_good, 0
        for name in ("fsync", "mkdir", "replace", "rename"):
            patch.setattr(os, name, self._guarded(getattr(os, name)))
        patch.setattr(atomic_io, "_exchange", self._guarded(atomic_io._exchange))
        real_open = io.open
        patch.setattr(io, "open", lambda *args, **kwargs: self._opened(real_open, *args, **kwargs))

    @property
    def struck(self) -> bool:
        return self._calls >= self._nth

    def count(self) -> None:
        self._calls += 1
        if self._calls == self._nth or (self._for_good and self.struck):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _guarded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.count()
            return call(*args, **kwargs)

        return guarded

    def _opened(self, real_open: Callable[..., Any], file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wax+"):
            return real_open(file, mode, *args, **kwargs)
        self.count()
        return _TornFile(real_open(file, mode, *args, **kwargs), self)


class _TornFile:
    """A file whose failing write leaves half of what it was given."""

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


def fail_every_call_in_turn(
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[], object],
    check: Callable[[bool], None],
    *,
    for_good: bool = False,
) -> int:
    """Let the first, second, ... call fail until `write` makes fewer calls than that.

    Args:
        monkeypatch: to patch and restore with.
        write: what is tried again and again.
        check: told after every attempt whether `write` says that it succeeded; the disk works again by then.
        for_good: after the N-th call every later one fails too, as on a disk that stays full.

    Returns:
        How many calls failed in turn.
    """
    for nth in itertools.count(1):
        assert nth < MANY, "the disk fails without end"
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch, nth, for_good=for_good)
            error = None
            try:
                write()
            except MexitError as caught:
                error = caught
        if error is not None:
            assert disk.struck
            assert "No space left on device" in str(error)
        check(error is None)
        if not disk.struck:
            return nth - 1
    raise AssertionError
