"""The rate limiter: a hard bound on what is computed, whatever arrives.

A token bucket holds at most `burst` MACs and gains `rate` MACs a second; a segment's MACs are taken from it before
the segment runs, for every row that goes into it. So in any window of T seconds at most burst + rate * T MACs are
let through, exactly: levels are whole billionths of a MAC, times whole nanoseconds, and nothing is ever rounded.
There is one bucket for all clients and one for each; a row takes its tokens from both, or from none.

A client without a bucket yet gets one that is as full as that of the strangers, which is full as long as the table
of clients never was. When the table is full, the client that was idle longest makes room, but only once its bucket
has filled up again, so that nobody is forgotten before everything was earned back; until then newcomers share the
strangers' bucket. A client thus never has more tokens than a bucket of its own, kept for ever, would hold.

Outside the bound: the rehearsals that a budget in milliseconds rests on, run once for a model and a device.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mexit.runtime.rate_limits import RateLimit, RateLimits, segment_macs

MAX_CLIENTS = 4096
_UNIT = 10**9  # of a MAC, and of a second: levels stay whole numbers


@dataclass(frozen=True)
class RateLimiterState:
    """What a rate limiter did so far.

    Attributes:
        refused: rows that had to answer because they were not let into segment k, for k from 2, (E-1,).
        waits: calls that had to wait for tokens of segment 1.
        overloaded: calls that were refused because their tokens would have come too late.
        tokens: MACs that all clients together could spend now; None without an overall bound.
        clients: that have a bucket of their own.
    """

    refused: tuple[int, ...]
    waits: int
    overloaded: int
    tokens: int | None
    clients: int


class RateLimiter:
    """The token buckets of one runtime. Safe to share between threads; every method takes constant time.

    Attributes:
        allowed: what the buckets hold.
        most_rows: whose segment 1 full buckets pay for.
    """

    def __init__(
        self,
        cumulative_macs: Sequence[int],
        allowed: RateLimits,
        *,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        max_clients: int = MAX_CLIENTS,
    ) -> None:
        """All buckets start full.

        Args:
            cumulative_macs: cost of leaving at each exit, (E,).
            allowed: what the buckets hold.
            clock_ns: a clock that never goes back.
            max_clients: buckets kept for single clients.
        """
        self.allowed = allowed
        bursts = [one.burst for one in (allowed.overall, allowed.client) if one is not None]
        self.most_rows = min((burst // cumulative_macs[0] for burst in bursts), default=sys.maxsize)
        self._segments = segment_macs(cumulative_macs)
        self._full = cumulative_macs[-1]
        self._clock_ns, self._max_clients = clock_ns, max_clients
        self._now_ns = clock_ns()
        self._overall = None if allowed.overall is None else _Bucket(allowed.overall, self._now_ns)
        self._strangers = None if allowed.client is None else _Bucket(allowed.client, self._now_ns)
        self._clients: OrderedDict[str, _Bucket] = OrderedDict()  # the client that was idle longest comes first
        self._refused = [0] * (len(self._segments) - 1)
        self._waits = self._overloaded = 0
        self._lock = threading.Lock()

    def begin(self, client: str, rows: int) -> int:
        """Pay for segment 1 of a batch: of all rows or of none. Returns how many are paid for.

        Of more than `most_rows` rows, so many. Rows that began one by one, as tokens come in, would cost the
        machine far more than their MACs.
        """
        with self._lock:
            return self._take(client, self._segments[0], min(rows, self.most_rows), whole=True)

    def enter(self, client: str, k: int, rows: int) -> int:
        """Pay for segment k (from 1) for as many of `rows` rows as there are tokens; returns how many."""
        with self._lock:
            read_limits = self._take(client, self._segments[k - 1], rows)
            if k > 1:
                self._refused[k - 2] += rows - read_limits
        return read_limits

    def watch(self, client: str, rows: int) -> int:
        """Pay for the whole network, as the drift watch runs it, for some rows; returns how many."""
        with self._lock:
            return self._take(client, self._full, rows)

    def wait_s(self, client: str, rows: int = 1) -> float:
        """Seconds until `rows` rows can have begun at the earliest: if nobody else spends anything; 0.0 is now."""
        macs = rows * self._segments[0]
        with self._lock:
            buckets = self._buckets(client)
            return max((bucket.wait_ns(macs, self._now_ns) for bucket in buckets), default=0) / _UNIT

    def count_wait(self) -> None:
        """A call has begun to wait."""
        with self._lock:
            self._waits += 1

    def count_overloaded(self) -> None:
        """A call was refused."""
        with self._lock:
            self._overloaded += 1

    def state(self) -> RateLimiterState:
        """A consistent copy of the counts."""
        with self._lock:
            now_ns = self._tick()
            tokens = None if self._overall is None else self._overall.level(now_ns) // _UNIT
            return RateLimiterState(
                tuple(self._refused), self._waits, self._overloaded, tokens, len(self._clients)
            )

    def _take(self, client: str, macs: int, rows: int, *, whole: bool = False) -> int:
        buckets = self._buckets(client)
        wanted = rows
        if macs:
            rows = min([rows, *(bucket.level(self._now_ns) // (macs * _UNIT) for bucket in buckets)])
        if whole and rows < wanted:
            return 0
        for bucket in buckets:
            bucket.spend(rows * macs)
        return rows

    def _buckets(self, client: str) -> list[_Bucket]:
        """Those that a client's rows need tokens of, at the time that is then in `_now_ns`."""
        self._tick()
        own = self._bucket_of(client)
        return [bucket for bucket in (self._overall, own) if bucket is not None]

    def _bucket_of(self, client: str) -> _Bucket | None:
        if self._strangers is None:
            return None
        if client in self._clients:
            self._clients.move_to_end(client)
            return self._clients[client]
        if len(self._clients) >= self._max_clients:
            idle = next(iter(self._clients))
            if not self._clients[idle].is_full(self._now_ns):
                return self._strangers
            del self._clients[idle]
        self._clients[client] = self._strangers.twin(self._now_ns)
        return self._clients[client]

    def _tick(self) -> int:
        self._now_ns = max(self._now_ns, self._clock_ns())
        return self._now_ns


class _Bucket:
    """One token bucket; levels in billionths of a MAC."""

    __slots__ = ("_at_ns", "_level", "_most", "_rate", "allowance")

    def __init__(self, allowance: RateLimit, now_ns: int) -> None:
        self.allowance = allowance
        self._rate, self._most = allowance.rate, allowance.burst * _UNIT
        self._level, self._at_ns = self._most, now_ns

    def level(self, now_ns: int) -> int:
        """The level, refilled up to now."""
        self._level = min(self._most, self._level + self._rate * (now_ns - self._at_ns))
        self._at_ns = now_ns
        return self._level

    def is_full(self, now_ns: int) -> bool:
        return self.level(now_ns) == self._most

    def spend(self, macs: int) -> None:
        self._level -= macs * _UNIT

    def wait_ns(self, macs: int, now_ns: int) -> int:
        """Nanoseconds until so many MACs can have been spent, at once or one after the other."""
        return max(0, -((self.level(now_ns) - macs * _UNIT) // self._rate))

    def twin(self, now_ns: int) -> _Bucket:
        """A bucket of its own with the same level."""
        other = _Bucket(self.allowance, now_ns)
        other._level = self.level(now_ns)
        return other
