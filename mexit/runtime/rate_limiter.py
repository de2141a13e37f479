"""A token bucket rate limiter: bounds the MACs that are computed, for all clients together and for each client.

A bucket holds at most `burst` tokens (MACs) and gains `rate` tokens per second. The tokens of a segment are taken
before the segment runs, for every row that enters it. In any window of T seconds at most `burst + rate * T` MACs are
therefore computed. The arithmetic is in integers, so the bound is exact.

A row takes its tokens from the bucket of all clients and from the bucket of its own client, or from neither.

The table of client buckets has a fixed size. When it is full, the client that was idle longest is evicted, provided
that its bucket is full again; otherwise new clients share the overflow bucket. A new client's bucket starts at the
level of the overflow bucket. Neither rule gives a client more tokens than a bucket of its own would have had.

The measurements behind a millisecond budget (`latency_profile`) are not limited.
"""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mexit.core.budget import Macs, exact_macs, format_macs, parse_macs
from mexit.errors import UsageError

MAX_CLIENTS = 4096
_NANO = 10**9  # levels count 1e-9 tokens: a rate in MACs per second times nanoseconds is then an integer


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


@dataclass(frozen=True)
class RateLimiterState:
    """Counters of a rate limiter.

    Attributes:
        refused: rows that got no tokens for segment k, for k from 2, (E-1,).
        waits: calls that waited for tokens of segment 1.
        overloaded: calls that were refused because their tokens would have come too late.
        tokens: MACs in the bucket of all clients; None without one.
        clients: number of client buckets.
    """

    refused: tuple[int, ...]
    waits: int
    overloaded: int
    tokens: int | None
    clients: int


class RateLimiter:
    """The token buckets of one runtime. Thread-safe; every method takes constant time.

    Attributes:
        limits: sizes and rates of the buckets.
        max_rows: the most rows that can start segment 1 at once, with full buckets.
    """

    def __init__(
        self,
        cumulative_macs: Sequence[int],
        limits: RateLimits,
        *,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        max_clients: int = MAX_CLIENTS,
    ) -> None:
        """All buckets start full.

        Args:
            cumulative_macs: cost of leaving at each exit, MACs, (E,).
            limits: sizes and rates of the buckets.
            clock_ns: a monotonic clock, nanoseconds.
            max_clients: size of the table of client buckets.
        """
        self.limits = limits
        self._set_costs(cumulative_macs)
        self._clock_ns, self._max_clients = clock_ns, max_clients
        now_ns = clock_ns()
        self._overall = None if limits.overall is None else _Bucket(limits.overall, now_ns)
        self._overflow = None if limits.client is None else _Bucket(limits.client, now_ns)
        self._clients: OrderedDict[str, _Bucket] = OrderedDict()  # least recently used first
        self._counts = _Counts([0] * (len(self._segments) - 1))
        self._lock = threading.Lock()

    def for_costs(self, cumulative_macs: Sequence[int]) -> RateLimiter:
        """The limiter of another network, with the same buckets and counters.

        Args:
            cumulative_macs: cost of leaving at each exit of that network, MACs, (E,).

        Raises:
            UsageError: a bucket is smaller than a segment, which could then never run.
        """
        for limit in (self.limits.overall, self.limits.client):
            if limit is not None:
                _check_burst(limit.burst, "burst", cumulative_macs)
        other = copy.copy(self)
        other._set_costs(cumulative_macs)
        with self._lock:
            self._counts.refused += [0] * (len(cumulative_macs) - 1 - len(self._counts.refused))
        return other

    def _set_costs(self, cumulative_macs: Sequence[int]) -> None:
        bursts = [limit.burst for limit in (self.limits.overall, self.limits.client) if limit is not None]
        self.max_rows = min((burst // cumulative_macs[0] for burst in bursts), default=sys.maxsize)
        self._segments = segment_macs(cumulative_macs)
        self._full_macs = cumulative_macs[-1]

    def acquire_all(self, client: str, rows: int) -> int:
        """Take the tokens of segment 1 for a batch: for all rows or for none.

        Rows that started one by one, as tokens come in, would lose the advantage of a batch.

        Args:
            client: name of the client.
            rows: size of the batch; only the first `max_rows` rows count.

        Returns:
            The number of rows that may start: 0 or `min(rows, max_rows)`.
        """
        rows = min(rows, self.max_rows)
        with self._lock:
            buckets = self._buckets(client)
            if _affordable(buckets, self._segments[0], rows) < rows:
                return 0
            _take(buckets, rows * self._segments[0])
        return rows

    def acquire(self, client: str, k: int, rows: int) -> int:
        """Take the tokens of segment k (from 1) for as many of `rows` rows as possible; returns that number."""
        with self._lock:
            admitted = self._take_affordable(client, self._segments[k - 1], rows)
            if k > 1:
                self._counts.refused[k - 2] += rows - admitted
        return admitted

    def acquire_full_pass(self, client: str, rows: int) -> int:
        """Take the tokens of the whole network for as many of `rows` rows as possible; returns that number."""
        with self._lock:
            return self._take_affordable(client, self._full_macs, rows)

    def wait_s(self, client: str, rows: int = 1) -> float:
        """Seconds until segment 1 can have started for `rows` rows, if nothing else takes tokens; 0.0 is now."""
        macs = rows * self._segments[0]
        with self._lock:
            return max((bucket.wait_ns(macs) for bucket in self._buckets(client)), default=0) / _NANO

    def count_wait(self) -> None:
        """Count a call that waits for tokens."""
        with self._lock:
            self._counts.waits += 1

    def count_overloaded(self) -> None:
        """Count a call that was refused."""
        with self._lock:
            self._counts.overloaded += 1

    def state(self) -> RateLimiterState:
        """A consistent copy of the counters."""
        with self._lock:
            tokens = None
            if self._overall is not None:
                self._overall.refill(self._clock_ns())
                tokens = self._overall.level // _NANO
            counts = self._counts
            return RateLimiterState(tuple(counts.refused), counts.waits, counts.overloaded, tokens, len(self._clients))

    def _take_affordable(self, client: str, macs: int, rows: int) -> int:
        """Take the tokens of as many rows as possible, at most `rows`, at `macs` each; returns that number."""
        buckets = self._buckets(client)
        admitted = _affordable(buckets, macs, rows)
        _take(buckets, admitted * macs)
        return admitted

    def _buckets(self, client: str) -> list[_Bucket]:
        """The refilled buckets from which the rows of a client take their tokens."""
        now_ns = self._clock_ns()
        buckets = [bucket for bucket in (self._overall, self._client_bucket(client, now_ns)) if bucket is not None]
        for bucket in buckets:
            bucket.refill(now_ns)
        return buckets

    def _client_bucket(self, client: str, now_ns: int) -> _Bucket | None:
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
        bucket = self._clients[client] = _Bucket(self._overflow.limit, now_ns)
        bucket.level = self._overflow.level
        return bucket


@dataclass
class _Counts:
    """Counters that the limiters of several networks share; see `RateLimiterState`."""

    refused: list[int]
    waits: int = 0
    overloaded: int = 0


class _Bucket:
    """One token bucket; `level` is its content in 1e-9 MACs at the last refill."""

    __slots__ = ("_capacity", "_refilled_ns", "level", "limit")

    def __init__(self, limit: RateLimit, now_ns: int) -> None:
        self.limit = limit
        self._capacity = limit.burst * _NANO
        self.level, self._refilled_ns = self._capacity, now_ns

    @property
    def is_full(self) -> bool:
        return self.level == self._capacity

    def refill(self, now_ns: int) -> None:
        self.level = min(self._capacity, self.level + self.limit.rate * (now_ns - self._refilled_ns))
        self._refilled_ns = now_ns

    def wait_ns(self, macs: int) -> int:
        """Nanoseconds until `macs` can have been taken, at once or in parts; rounded up."""
        return max(0, -((self.level - macs * _NANO) // self.limit.rate))


def _affordable(buckets: Sequence[_Bucket], macs: int, rows: int) -> int:
    """The number of rows, at most `rows`, at `macs` each, that every bucket has tokens for."""
    if not macs:
        return rows
    return min([rows, *(bucket.level // (macs * _NANO) for bucket in buckets)])


def _take(buckets: Sequence[_Bucket], macs: int) -> None:
    for bucket in buckets:
        bucket.level -= macs * _NANO


def segment_macs(cumulative_macs: Sequence[int]) -> tuple[int, ...]:
    """Cost of each segment alone, MACs, (E,), from the cumulative costs, (E,)."""
    return tuple(cost - before for before, cost in zip((0, *cumulative_macs), cumulative_macs, strict=False))


def read_rate_limits(
    cumulative_macs: Sequence[int],
    rate: Macs | None = None,
    burst: Macs | None = None,
    client_rate: Macs | None = None,
    client_burst: Macs | None = None,
) -> RateLimits:
    """The limits that a user gave, checked against the costs of a network.

    A burst that is not given is the MACs of one second, or of one image through the whole network if that is more.

    Args:
        cumulative_macs: cost of leaving at each exit, MACs, (E,).
        rate, client_rate: MACs per second, for example `40M`, `1.5G`, `800k` or 2000000.
        burst, client_burst: MACs, written in the same way.

    Raises:
        UsageError: a value is not a number of MACs, a burst has no rate, or a burst is smaller than a segment.
    """
    return RateLimits(
        _rate_limit("rate", "burst", rate, burst, cumulative_macs),
        _rate_limit("client rate", "client burst", client_rate, client_burst, cumulative_macs),
    )


def _rate_limit(
    rate_name: str, burst_name: str, rate: Macs | None, burst: Macs | None, cumulative_macs: Sequence[int]
) -> RateLimit | None:
    if rate is None:
        if burst is not None:
            flag = f"--{rate_name.replace(' ', '-')}"
            raise UsageError(f"a {burst_name} refills at a {rate_name}: give {flag} too, in MACs a second")
        return None
    per_second = parse_macs(rate, rate_name)
    capacity = max(per_second, cumulative_macs[-1]) if burst is None else parse_macs(burst, burst_name)
    _check_burst(capacity, burst_name, cumulative_macs)
    return RateLimit(per_second, capacity)


def _check_burst(capacity: int, name: str, cumulative_macs: Sequence[int]) -> None:
    largest = max(segment_macs(cumulative_macs))
    if capacity < largest:
        raise UsageError(
            f"a {name} of {format_macs(capacity)} is less than the largest segment costs, which could then "
            f"never run: give at least {exact_macs(largest)}"
        )
