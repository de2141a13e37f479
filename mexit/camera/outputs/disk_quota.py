"""A size limit for the files of one kind in a folder: the oldest are removed."""

from __future__ import annotations

import math
import re
from collections import deque
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from mexit.errors import MexitError, UsageError


class DiskQuota:
    """Counts the bytes of files whose names begin with the time, and removes the oldest above a limit.

    Files of one name with several suffixes belong together and are removed together. Files of other names are never
    touched. Not thread-safe.
    """

    def __init__(self, folder: Path, pattern: re.Pattern[str], max_mb: float) -> None:
        """Count the files of earlier runs; remove none yet.

        Args:
            folder: the folder; it need not exist.
            pattern: full names of the files, which sort by their time.
            max_mb: the limit, 10^6 bytes.

        Raises:
            UsageError: the limit is not positive.
        """
        if not 0 < max_mb < math.inf:
            raise UsageError(f"a quota is a number of MB above 0, found {max_mb:g}")
        self._max_bytes = round(max_mb * 1e6)
        self._entries: deque[tuple[tuple[Path, ...], int]] = deque()
        self._bytes = 0
        with suppress(OSError):
            found = sorted((path for path in folder.iterdir() if pattern.fullmatch(path.name)), key=_stem)
            for _, paths in groupby(found, _stem):
                self._count(tuple(paths))

    @property
    def bytes(self) -> int:
        """Size of the counted files."""
        return self._bytes

    def add(self, *paths: Path) -> None:
        """Count new files that belong together; remove the oldest files until all fit. The newest always stay.

        Raises:
            MexitError: a file cannot be removed.
        """
        self._count(paths)
        while self._bytes > self._max_bytes and len(self._entries) > 1:
            oldest, size = self._entries.popleft()
            self._bytes -= size
            for path in oldest:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise MexitError(f"could not remove {path}, which exceeds the quota: {error.strerror}") from None

    def _count(self, paths: tuple[Path, ...]) -> None:
        size = 0
        for path in paths:
            with suppress(OSError):
                size += path.stat().st_size
        self._entries.append((paths, size))
        self._bytes += size


def _stem(path: Path) -> str:
    return path.stem
