"""The token buckets and counters of a rate limiter that several processes share."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mexit.runtime.token_buckets import COUNTERS, MAX_CLIENTS, NANO, Bucket, RateLimit, RateLimits

_SET_SIZE = 16


class _Stored(Bucket):
    """A bucket read from a file, at an offset."""

    __slots__ = ("offset",)

    def __init__(self, limit: RateLimit, level: int, refilled_ns: int, offset: int) -> None:
        super().__init__(limit, level, refilled_ns)
        self.offset = offset


class SharedBuckets:
    """The `TokenBuckets` of several processes, in a file that they map.

    A client's bucket has one of 16 places, which its name decides; only these count as the table for its evictions.
    The lock is one of the system, which releases it when its process dies. Every bucket is written at once, so that a
    process that dies does not leave half of a change.
    """

    _LEVEL = struct.Struct("<16sq")
    _RECORD = 48  # level 16, refilled 8, used 8, client 16
    _HEADER = 80 + 8 * COUNTERS

    def __init__(self, path: Path, limits: RateLimits, now_ns: int, max_clients: int = MAX_CLIENTS) -> None:
        """Open the file of another process, whose limits then hold, or write one, in which all buckets start full."""
        self._sets = max(1, max_clients // _SET_SIZE)
        self._first = self._HEADER + 2 * self._RECORD  # after the overall and the overflow bucket
        size = self._first + self._sets * _SET_SIZE * self._RECORD
        self._file = path.open("a+b")
        self._thread_lock = threading.Lock()
        with self.locked():
            is_new = path.stat().st_size < size
            if is_new:
                self._file.truncate(size)
            self._memory = mmap.mmap(self._file.fileno(), size)
            if is_new:
                self._write_new(limits, now_ns)
        self.limits = self._read_limits()
        self.counts: memoryview[int] = memoryview(self._memory)[80 : self._HEADER].cast("q")

    @contextmanager
    def locked(self) -> Iterator[None]:
        with self._thread_lock:  # the lock of the file is one of the process
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)

    def buckets(self, client: str, now_ns: int) -> list[Bucket]:
        found = [bucket for bucket in (self.overall(now_ns), self._client(client, now_ns)) if bucket is not None]
        for bucket in found:
            bucket.refill(now_ns)
        return found

    def overall(self, now_ns: int) -> Bucket | None:
        bucket = None if self.limits.overall is None else self._load(self._HEADER, self.limits.overall)
        if bucket is not None:
            bucket.refill(now_ns)
        return bucket

    def save(self, buckets: list[Bucket]) -> None:
        for bucket in buckets:
            assert isinstance(bucket, _Stored)
            self._store(bucket)

    def clients(self) -> int:
        ends = range(self._first, len(self._memory), self._RECORD)
        return sum(self._memory[offset + 24 : offset + 32] != bytes(8) for offset in ends)

    def _client(self, client: str, now_ns: int) -> _Stored | None:
        limit = self.limits.client
        if limit is None:
            return None
        key = hashlib.blake2b(client.encode(), digest_size=16, key=self._memory[64:80]).digest()
        start = self._first + int.from_bytes(key[:8], "little") % self._sets * _SET_SIZE * self._RECORD
        offsets = range(start, start + _SET_SIZE * self._RECORD, self._RECORD)
        place = next((one for one in offsets if self._memory[one + 32 : one + 48] == key and self._used(one)), None)
        if place is None:
            place = min(offsets, key=self._used)
            overflow = self._load(self._HEADER + self._RECORD, limit)
            overflow.refill(now_ns)
            if self._used(place):
                idle = self._load(place, limit)
                idle.refill(now_ns)
                if not idle.is_full:
                    return overflow
            self._memory[place + 24 : place + 32] = bytes(8)
            self._memory[place : place + 24] = self._LEVEL.pack(_bytes(overflow.level), now_ns)
            self._memory[place + 32 : place + 48] = key
        self._memory[place + 24 : place + 32] = max(1, now_ns).to_bytes(8, "little")
        return self._load(place, limit)

    def _used(self, offset: int) -> int:
        """When the record was last used, nanoseconds; 0 if it is free."""
        return int.from_bytes(self._memory[offset + 24 : offset + 32], "little")

    def _load(self, offset: int, limit: RateLimit) -> _Stored:
        level, refilled_ns = self._LEVEL.unpack(self._memory[offset : offset + 24])
        return _Stored(limit, int.from_bytes(level, "little", signed=True), refilled_ns, offset)

    def _store(self, bucket: _Stored) -> None:
        content = self._LEVEL.pack(_bytes(bucket.level), bucket.refilled_ns)
        self._memory[bucket.offset : bucket.offset + 24] = content

    def _write_new(self, limits: RateLimits, now_ns: int) -> None:
        pairs = [(0, 0) if limit is None else (limit.rate, limit.burst) for limit in (limits.overall, limits.client)]
        self._memory[:64] = b"".join(_bytes(number) for pair in pairs for number in pair)
        self._memory[64:80] = os.urandom(16)  # clients cannot choose addresses that share places with another's
        for offset, limit in ((self._HEADER, limits.overall), (self._HEADER + self._RECORD, limits.client)):
            if limit is not None:
                self._memory[offset : offset + 24] = self._LEVEL.pack(_bytes(limit.burst * NANO), now_ns)

    def _read_limits(self) -> RateLimits:
        numbers = [int.from_bytes(self._memory[offset : offset + 16], "little") for offset in range(0, 64, 16)]
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        return RateLimits(*(RateLimit(rate, burst) if rate else None for rate, burst in pairs))


def _bytes(number: int) -> bytes:
    return number.to_bytes(16, "little", signed=True)
