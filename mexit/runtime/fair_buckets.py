"""Token buckets of a few known clients that share one limit: unused tokens of a client go to the others.

Each of n clients has a bucket of its own that gains 1/n of the rate. What does not fit into it flows into a bucket that
all clients share. A client takes tokens from its own bucket first, then from the shared one. A busy client thus never
takes what another one has saved up, and an idle client's tokens are not lost. All buckets together gain the rate and
hold the burst, so the bound of `rate_limiter` holds for the sum.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mexit.runtime.token_buckets import COUNTERS, NANO, Bucket, RateLimit, RateLimits


class _ClientBucket(Bucket):
    """What one client can take now: its own tokens and the shared ones."""

    __slots__ = ("client", "taken_from")

    def __init__(self, limit: RateLimit, level: int, now_ns: int, client: str) -> None:
        super().__init__(limit, level, now_ns)
        self.client, self.taken_from = client, level


class FairBuckets:
    """The `TokenBuckets` of known clients; an unknown client takes shared tokens alone."""

    def __init__(self, limit: RateLimit, clients: Sequence[str], shared_macs: int, now_ns: int) -> None:
        """All buckets start full.

        Args:
            limit: of all clients together.
            clients: their names.
            shared_macs: least capacity of the shared bucket, MACs, such as those of one image.
            now_ns: time of the clock of the rate limiter, nanoseconds.
        """
        self.limits = RateLimits(overall=limit)
        self.counts = [0] * COUNTERS
        self._limit = limit
        self._own_capacity = max(0, limit.burst - shared_macs) * NANO // max(1, len(clients))
        self._own = dict.fromkeys(clients, self._own_capacity)
        self._shared = self._shared_capacity = limit.burst * NANO - self._own_capacity * len(self._own)
        self._refilled_ns = now_ns
        self._lock = threading.Lock()

    @contextmanager
    def locked(self) -> Iterator[None]:
        with self._lock:
            yield

    def buckets(self, client: str, now_ns: int) -> list[Bucket]:
        self._refill(now_ns)
        return [_ClientBucket(self._limit, self._own.get(client, 0) + self._shared, now_ns, client)]

    def overall(self, now_ns: int) -> Bucket:
        self._refill(now_ns)
        return Bucket(self._limit, sum(self._own.values()) + self._shared, now_ns)

    def save(self, buckets: list[Bucket]) -> None:
        for bucket in buckets:
            assert isinstance(bucket, _ClientBucket)
            spent, bucket.taken_from = bucket.taken_from - bucket.level, bucket.level
            own = min(spent, self._own.get(bucket.client, 0))
            if own:
                self._own[bucket.client] -= own
            self._shared -= spent - own

    def clients(self) -> int:
        return len(self._own)

    def _refill(self, now_ns: int) -> None:
        """Add the tokens since the last refill: equal parts to the clients, the rest to all."""
        left = self._limit.rate * (now_ns - self._refilled_ns)
        self._refilled_ns = now_ns
        part = left // max(1, len(self._own))
        for client in self._own:
            left -= self._add(client, part)
        shared = min(self._shared_capacity, self._shared + left)
        left, self._shared = left - (shared - self._shared), shared
        for client in self._own if left else ():
            left -= self._add(client, left)

    def _add(self, client: str, tokens: int) -> int:
        """Add tokens to a client's bucket; return how many fit."""
        before = self._own[client]
        self._own[client] = min(self._own_capacity, before + tokens)
        return self._own[client] - before
