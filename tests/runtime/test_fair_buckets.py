"""Known clients that share one limit."""

from __future__ import annotations

import random

from mexit.runtime.fair_buckets import FairBuckets
from mexit.runtime.rate_limiter import RateLimiter
from mexit.runtime.token_buckets import RateLimit

COSTS = (10, 30, 100)
SECOND = 10**9


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def fair(clients: list[str], rate: int, burst: int) -> tuple[RateLimiter, Clock]:
    clock = Clock()
    buckets = FairBuckets(RateLimit(rate, burst), clients, COSTS[-1], clock())
    return RateLimiter(COSTS, buckets.limits, clock_ns=clock, shared=buckets), clock


def spend(limiter: RateLimiter, client: str) -> int:
    """Take tokens of segment 1 until there are none; return the number of MACs."""
    rows = 0
    while limiter.acquire_all(client, 1):
        rows += 1
    return rows * COSTS[0]


def test_a_busy_client_leaves_the_others_their_share() -> None:
    limiter, clock = fair(["busy", "slow"], rate=1000, burst=1100)
    assert spend(limiter, "busy") == 600, "its own half of 1000, and the 100 that all share"
    for second in range(1, 5):
        clock.now_ns = second * SECOND
        busy = spend(limiter, "busy")
        assert busy >= 500
        assert limiter.acquire_all("slow", 1) == 1, "saved up"


def test_unused_tokens_go_to_a_busy_client() -> None:
    limiter, clock = fair(["busy", "idle"], rate=1000, burst=1100)
    spend(limiter, "busy")
    total = 0
    for step in range(1, 41):
        clock.now_ns = step * SECOND // 4
        total += spend(limiter, "busy")
    assert 9_900 <= total <= 10_000, "ten seconds at the whole rate"


def test_the_sum_is_bounded() -> None:
    clients, draw = [f"camera {i}" for i in range(8)], random.Random(0)
    limiter, clock = fair(clients, rate=777, burst=500)
    spent, starts = 0, [(0, 0)]
    for _ in range(2000):
        clock.now_ns += draw.randrange(SECOND // 20)
        client, k = draw.choice([*clients, "unknown"]), draw.randrange(1, 4)
        spent += limiter.acquire(client, k, 1) * (COSTS[k - 1] - (COSTS[k - 2] if k > 1 else 0))
        starts.append((clock.now_ns, spent))
    for position in range(0, len(starts), 97):
        since_ns, before = starts[position]
        for now_ns, after in starts[position:]:
            assert (after - before) * SECOND <= 500 * SECOND + 777 * (now_ns - since_ns)
    assert spent > 0.8 * 777 * clock.now_ns / SECOND


def test_every_segment_can_run_however_many_clients_there_are() -> None:
    limiter, _ = fair([str(i) for i in range(50)], rate=10, burst=100)
    assert [limiter.acquire("7", k, 1) for k in (1, 2, 3)] == [1, 1, 1]
    assert limiter.acquire("8", 1, 1) == 0
    assert limiter.state().tokens == 0
    assert limiter.state().clients == 50


def test_the_wait_for_tokens() -> None:
    limiter, clock = fair(["a", "b"], rate=10, burst=100)
    assert spend(limiter, "a") == 100
    wait_s = limiter.wait_s("a", 1)
    assert 0 < wait_s <= 1.0
    clock.now_ns += 2 * SECOND
    assert limiter.wait_s("a", 1) == 0.0
