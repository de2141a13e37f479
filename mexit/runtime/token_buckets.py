"""The token buckets and counters of a rate limiter.

The table of client buckets has a fixed size. When it is full, the client that was idle longest is evicted, provided
that its bucket is full again; otherwise new clients share the overflow bucket. A new client's bucket starts at the
level of the overflow bucket. Neither rule gives a client more tokens than a bucket of its own would have had.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

MAX_CLIENTS = 4096
NANO = 10**9  # levels count 1e-9 tokens: a rate in MACs per second times nanoseconds is then an integer
MAX_SEGMENTS = 64  # with a counter of their own; later ones share the last
# Indices of counters; from REFUSED on: rows refused for segment 2, 3, ...
WAITS, OVERLOADED, SERIES, REFUSED = range(4)
COUNTERS = REFUSED + MAX_SEGMENTS


@dataclass(frozen=True)
class RateLimit:
    """Size and refill rate of one token bucket.

    Attributes:
        rate: refill rate, MACs per second.
        burst: capacity, MACs.
    """

    rate: int
    burst: int


@dataclass(frozen=True)
class RateLimits:
    """The limit of all clients together and the limit of each client; None is unlimited."""

    overall: RateLimit | None = None
    client: RateLimit | None = None


class Bucket:
    """One token bucket; `level` is its content in 1e-9 MACs at the last refill, at `refilled_ns`."""

    __slots__ = ("capacity", "level", "limit", "refilled_ns")

    def __init__(self, limit: RateLimit, level: int, refilled_ns: int) -> None:
        self.limit = limit
        self.capacity = limit.burst * NANO
        self.level, self.refilled_ns = level, refilled_ns

    @property
    def is_full(self) -> bool:
        """Whether it was full at the last refill."""
        return self.level == self.capacity

    def refill(self, now_ns: int) -> None:
        """Add the tokens since the last refill."""
        self.level = min(self.capacity, self.level + self.limit.rate * (now_ns - self.refilled_ns))
        self.refilled_ns = now_ns

    def wait_ns(self, macs: int) -> int:
        """Nanoseconds until `macs` can have been taken, at once or in parts; rounded up."""
        return max(0, -((self.level - macs * NANO) // self.limit.rate))


class Counters(Protocol):
    """Whole numbers by index."""

    def __getitem__(self, index: int, /) -> int: ...

    def __setitem__(self, index: int, value: int, /) -> None: ...


class TokenBuckets(Protocol):
    """What a rate limiter needs; everything but `locked` is called within `locked`.

    Attributes:
        limits: sizes and rates of the buckets.
    """

    limits: RateLimits

    @property
    def counts(self) -> Counters:
        """The counters, at the indices `WAITS`, `OVERLOADED`, `SERIES` and those from `REFUSED` on."""

    def locked(self) -> AbstractContextManager[None]:
        """Exclude all other users."""

    def buckets(self, client: str, now_ns: int) -> list[Bucket]:
        """The refilled buckets from which the rows of a client take their tokens."""

    def overall(self, now_ns: int) -> Bucket | None:
        """The refilled bucket of all clients, if there is one."""

    def save(self, buckets: list[Bucket]) -> None:
        """Keep the levels of changed buckets."""

    def clients(self) -> int:
        """The number of client buckets."""


class PrivateBuckets:
    """The `TokenBuckets` of one process."""

    def __init__(self, limits: RateLimits, now_ns: int, max_clients: int = MAX_CLIENTS) -> None:
        """All buckets start full."""
        self.limits = limits
        self.counts = [0] * COUNTERS
        self._max_clients = max_clients
        self._overall = _full(limits.overall, now_ns)
        self._overflow = _full(limits.client, now_ns)
        self._clients: OrderedDict[str, Bucket] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def locked(self) -> AbstractContextManager[None]:
        return _within(self._lock)

    def buckets(self, client: str, now_ns: int) -> list[Bucket]:
        found = [bucket for bucket in (self._overall, self._client(client, now_ns)) if bucket is not None]
        for bucket in found:
            bucket.refill(now_ns)
        return found

    def overall(self, now_ns: int) -> Bucket | None:
        if self._overall is not None:
            self._overall.refill(now_ns)
        return self._overall

    def save(self, buckets: list[Bucket]) -> None:
        pass  # they are the stored ones

    def clients(self) -> int:
        return len(self._clients)

    def _client(self, client: str, now_ns: int) -> Bucket | None:
        if self._overflow is None:
            return None
        if client in self._clients:
            self._clients.move_to_end(client)
            return self._clients[client]
        self._overflow.refill(now_ns)
        if len(self._clients) >= self._max_clients:
            idle = next(iter(self._clients))
            self._clients[idle].refill(now_ns)
            if not self._clients[idle].is_full:
                return self._overflow
            del self._clients[idle]
        bucket = self._clients[client] = Bucket(self._overflow.limit, self._overflow.level, now_ns)
        return bucket


def _full(limit: RateLimit | None, now_ns: int) -> Bucket | None:
    return None if limit is None else Bucket(limit, limit.burst * NANO, now_ns)


@contextmanager
def _within(lock: threading.Lock) -> Iterator[None]:
    with lock:
        yield
