"""The rate limiter: the MACs spent in any window stay within burst + rate * T, and nothing else changes."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mexit.core.exit_policy import Policy
from mexit.errors import UsageError
from mexit.runtime.backends.base import HostCarried
from mexit.runtime.backends.fake import FakeBackend, images_for
from mexit.runtime.engine import answer
from mexit.runtime.rate_limiter import RateLimit, RateLimiter, RateLimits, read_rate_limits
from mexit.runtime.reference import answer_slowly

COSTS = (3, 10, 24)
SEGMENTS = (3, 7, 14)
SECOND = 10**9
LIMIT = st.builds(RateLimit, st.integers(1, 60), st.integers(14, 90))
CLIENT = st.sampled_from("abcd")
PAUSE, ROWS = st.integers(0, 3 * SECOND), st.integers(0, 12)
SEGMENT_REQUEST = st.tuples(CLIENT, PAUSE, st.integers(1, 3), ROWS)
REQUEST = st.tuples(CLIENT, PAUSE, st.sampled_from(["batch", "segment 2", "segment 3", "full pass"]), ROWS)


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns


def worst_excess(spent: Iterable[tuple[int, int]], limit: RateLimit) -> int:
    """By how much the worst window of (time in ns, MACs) exceeds its bound, in 1e-9 MACs; 0 if none does.

    For a window from event i to event j the excess is S(j) - S(i-1) - rate (t(j) - t(i)) - burst. The largest one
    for each j needs only the smallest S(i-1) - rate t(i) so far.
    """
    worst, total, lowest = 0, 0, None
    for at_ns, macs in spent:
        start = total - limit.rate * at_ns
        lowest = start if lowest is None else min(lowest, start)
        total += macs * SECOND
        worst = max(worst, total - limit.rate * at_ns - lowest - limit.burst * SECOND)
    return worst


def spend(limiter: RateLimiter, client: str, kind: str, rows: int) -> int:
    """Make one request; returns the MACs that were admitted."""
    if kind == "batch":
        return limiter.acquire_all(client, rows) * SEGMENTS[0]
    if kind == "full pass":
        return limiter.acquire_full_pass(client, rows) * COSTS[-1]
    k = int(kind[-1])
    return limiter.acquire(client, k, rows) * SEGMENTS[k - 1]


@settings(max_examples=300, deadline=None)
@given(st.none() | LIMIT, st.none() | LIMIT, st.integers(1, 5), st.lists(REQUEST, max_size=60))
def test_no_window_exceeds_burst_plus_rate_times_time(overall, each, max_clients, requests) -> None:
    """Globally and per client, for any sequence of requests and any size of the table of clients."""
    clock = Clock()
    limiter = RateLimiter(COSTS, RateLimits(overall, each), clock_ns=clock, max_clients=max_clients)
    spent = []
    for client, pause_ns, kind, rows in requests:
        clock.ns += pause_ns
        spent.append((client, clock.ns, spend(limiter, client, kind, rows)))
    if overall is not None:
        assert worst_excess([(at_ns, macs) for _, at_ns, macs in spent], overall) <= 0
    for name in "abcd" if each is not None else "":
        assert worst_excess([(at_ns, macs) for client, at_ns, macs in spent if client == name], each) <= 0
    assert limiter.state().clients <= max_clients


@settings(max_examples=200, deadline=None)
@given(LIMIT, LIMIT, st.lists(SEGMENT_REQUEST, max_size=40))
def test_it_admits_as_much_as_exact_buckets_hold(overall, each, requests) -> None:
    """The reference has a bucket for each client, kept for ever, in exact fractions."""
    clock = Clock()
    limiter = RateLimiter(COSTS, RateLimits(overall, each), clock_ns=clock)
    levels = {"": Fraction(overall.burst), **dict.fromkeys("abcd", Fraction(each.burst))}
    for client, pause_ns, k, rows in requests:
        clock.ns += pause_ns
        for name, level in levels.items():
            limit = each if name else overall
            levels[name] = min(Fraction(limit.burst), level + Fraction(limit.rate * pause_ns, SECOND))
        expected = min(rows, *(int(levels[name] // SEGMENTS[k - 1]) for name in ("", client)))
        assert limiter.acquire(client, k, rows) == expected
        for name in ("", client):
            levels[name] -= expected * SEGMENTS[k - 1]
        assert limiter.state().tokens == int(levels[""])


@settings(max_examples=100, deadline=None)
@given(LIMIT, st.none() | LIMIT, st.integers(0, 2 * SECOND), st.integers(1, 4))
def test_the_wait_is_exact_to_the_nanosecond(overall, each, pause_ns, rows) -> None:
    """Row by row: the tokens are there after the announced wait, and not a nanosecond earlier."""
    clock = Clock()
    limiter = RateLimiter(COSTS, RateLimits(overall, each), clock_ns=clock)
    while limiter.acquire("a", 1, 1):
        pass
    clock.ns += pause_ns
    waits_ns = [round(limiter.wait_s("a", count) * SECOND) for count in range(1, rows + 1)]
    start_ns, started = clock.ns, 0
    for wait_ns in waits_ns:
        if wait_ns:
            clock.ns = start_ns + wait_ns - 1
            started += limiter.acquire("a", 1, 1)
        clock.ns = start_ns + wait_ns
        started += limiter.acquire("a", 1, 1)
    assert started == rows
    assert clock.ns == start_ns + waits_ns[-1]


def test_tokens_are_taken_from_both_buckets_or_none() -> None:
    limiter = RateLimiter(COSTS, RateLimits(RateLimit(1, 14), RateLimit(1, 100)), clock_ns=Clock())
    assert limiter.acquire("a", 3, 5) == 1  # the bucket of all clients is empty now
    assert limiter.acquire("b", 3, 1) == 0
    assert limiter.wait_s("b") == 3
    assert limiter.state().refused == (0, 5)


def test_a_batch_starts_as_a_whole_or_waits() -> None:
    clock = Clock()
    limiter = RateLimiter(COSTS, RateLimits(RateLimit(3, 31), RateLimit(3, 50)), clock_ns=clock)
    assert limiter.max_rows == 10
    assert limiter.acquire_all("a", 4) == 4
    assert limiter.acquire_all("a", 7) == 0
    assert limiter.state().tokens == 19
    clock.ns += round(limiter.wait_s("a", 7) * SECOND)
    assert limiter.acquire_all("a", 7) == 7
    clock.ns += 20 * SECOND
    assert limiter.acquire_all("a", 1000) == 10  # more than full buckets hold: the first `max_rows` rows


def test_one_client_cannot_spend_the_tokens_of_another() -> None:
    limiter = RateLimiter(COSTS, RateLimits(RateLimit(10, 100), RateLimit(5, 50)), clock_ns=Clock())
    assert limiter.acquire("attacker", 1, 1000) == 16
    assert limiter.acquire("attacker", 1, 1000) == 0
    assert limiter.acquire("clean", 1, 16) == 16


def test_invented_client_names_gain_nothing_once_the_table_is_full() -> None:
    clock = Clock()
    limiter = RateLimiter(COSTS, RateLimits(None, RateLimit(1, 30)), clock_ns=clock, max_clients=2)
    assert [limiter.acquire(f"name {i}", 1, 10) for i in range(6)] == [10, 10, 10, 0, 0, 0]
    clock.ns += 30 * SECOND  # all buckets are full again
    assert [limiter.acquire(f"other {i}", 1, 10) for i in range(3)] == [10, 10, 10]
    assert limiter.state().clients == 2


def test_moving_from_the_overflow_bucket_to_an_own_bucket_gives_no_extra_tokens() -> None:
    clock = Clock()
    limiter = RateLimiter(COSTS, RateLimits(None, RateLimit(1, 30)), clock_ns=clock, max_clients=1)
    assert limiter.acquire("first", 1, 1) == 1
    assert limiter.acquire("second", 1, 10) == 10  # from the overflow bucket, which is empty now
    clock.ns += 3 * SECOND  # the bucket of the first client is full again, so the client is evicted
    assert limiter.acquire("second", 1, 10) == 1
    assert limiter.state().clients == 1


def test_an_evicted_client_comes_back_with_no_more_than_a_full_bucket() -> None:
    clock = Clock()
    limiter = RateLimiter(COSTS, RateLimits(None, RateLimit(3, 30)), clock_ns=clock, max_clients=1)
    assert limiter.acquire("first", 1, 10) == 10
    clock.ns += 5 * SECOND  # half full: not evicted
    assert limiter.acquire("second", 1, 10) == 10
    assert limiter.acquire("first", 1, 10) == 5
    clock.ns += 10 * SECOND
    assert limiter.acquire("second", 1, 10) == 10  # the first client is evicted with a full bucket
    assert limiter.acquire("first", 1, 20) == 10  # and now uses the overflow bucket
    assert limiter.acquire("first", 1, 1) == 0


def test_threads_together_take_what_one_could() -> None:
    limiter = RateLimiter(COSTS, RateLimits(RateLimit(1, 3000), RateLimit(1, 900)), clock_ns=Clock())
    taken = dict.fromkeys("abcdefgh", 0)

    def take(client: str) -> None:
        for _ in range(200):
            taken[client] += limiter.acquire(client, 1, 2)

    threads = [threading.Thread(target=take, args=(client,)) for client in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken.values()) == 1000
    assert max(taken.values()) <= 300


class RecordingSegment:
    """A segment that records the time and the MACs of each run."""

    def __init__(self, segment, macs: int, clock: Clock, spent: list[tuple[int, int]]) -> None:
        self._segment, self._macs, self._clock, self._spent = segment, macs, clock, spent

    def run(self, carried: HostCarried):
        self._spent.append((self._clock(), carried.rows * self._macs))
        return self._segment.run(carried)


BATCHES = st.lists(st.tuples(st.integers(0, SECOND), st.lists(st.integers(0, 39), max_size=9)), max_size=12)
THRESHOLDS = st.lists(st.none() | st.floats(-3, 3), min_size=2, max_size=2)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1000), THRESHOLDS, LIMIT, BATCHES)
def test_a_rate_limited_engine_keeps_the_bound_and_equals_the_reference(seed, thresholds, limit, batches) -> None:
    """Arbitrary scores and arrivals: the MACs that the segments ran are bounded, and every answer is right."""
    clock, spent = Clock(), list[tuple[int, int]]()
    logits = (3 * np.random.default_rng(seed).normal(size=(3, 40, 5))).astype(np.float32)
    plain, recording = FakeBackend(logits), FakeBackend(logits)
    recording.segments = tuple(
        RecordingSegment(*pair, clock, spent) for pair in zip(plain.segments, SEGMENTS, strict=True)
    )
    policy = Policy("max-probability", False, (1.0,) * 3, tuple(thresholds))
    limiter = RateLimiter(COSTS, RateLimits(limit), clock_ns=clock)
    for pause_ns, rows in batches:
        clock.ns += pause_ns
        started = rows[: limiter.acquire_all("", len(rows))]
        admitted: dict[int, int] = {}

        def permit(k: int, count: int, admitted=admitted) -> int:
            clock.ns += 1
            return admitted.setdefault(k, limiter.acquire("", k, count))

        images = images_for(np.asarray(started, np.int64), (1, 2, 2))
        fast = answer(recording, images, policy, 5, permit=permit)
        exits, probabilities, _ = answer_slowly(plain, images, policy, 5, permit=lambda k, _, a=admitted: a[k])
        assert fast.exits == exits.tolist()
        assert fast.probabilities.tolist() == probabilities.tolist()
        unlimited, *_ = answer_slowly(plain, images, policy, 5)
        assert [reason == "rate-limit" for reason in fast.reasons] == (exits < unlimited).tolist()
    assert worst_excess(spent, limit) <= 0


def test_the_first_rows_of_a_batch_continue() -> None:
    fake = FakeBackend(np.zeros((3, 6, 5), np.float32))
    never = Policy("max-probability", False, (1.0,) * 3, (None, None))
    rows = images_for(np.arange(6), (1, 2, 2))
    answers = answer(fake, rows, never, 5, permit=lambda k, _: {2: 4, 3: 1}[k])
    assert answers.exits == [3, 2, 2, 2, 1, 1]
    assert answers.reasons == ("last", *["rate-limit"] * 5)
    assert len(answers.segment_seconds) == 3


def test_rows_that_exit_for_another_reason_take_no_tokens() -> None:
    fake = FakeBackend(np.zeros((3, 6, 5), np.float32))
    rows = images_for(np.arange(6), (1, 2, 2))
    never, always = (Policy("margin", False, (1.0,) * 3, (threshold, None)) for threshold in (None, -1e9))

    def refuse(k: int, count: int) -> int:
        pytest.fail(f"tokens of segment {k} were taken for {count} rows")

    assert set(answer(fake, rows, always, 5, permit=refuse).reasons) == {"confident"}
    assert set(answer(fake, rows, never, 5, permit=refuse, max_exit=1).reasons) == {"max-exit"}
    assert set(answer(fake, rows, never, 5, permit=refuse, deadline_s=0.0).reasons) == {"deadline"}


def test_limits_as_typed_and_their_defaults() -> None:
    costs = (100, 1000, 5000)
    assert read_rate_limits(costs) == RateLimits()
    assert read_rate_limits(costs, "20k").overall == RateLimit(20_000, 20_000)  # the MACs of one second
    assert read_rate_limits(costs, "2k").overall == RateLimit(2000, 5000)  # one image through the whole network
    assert read_rate_limits(costs, client_rate="2k", client_burst="4k") == RateLimits(None, RateLimit(2000, 4000))
    with pytest.raises(UsageError, match=r"less than the largest segment costs.*at least 4000"):
        read_rate_limits(costs, "2k", "3999")
    with pytest.raises(UsageError, match="give --rate too"):
        read_rate_limits(costs, burst="2k")
    with pytest.raises(UsageError, match="give --client-rate too"):
        read_rate_limits(costs, "2k", client_burst="5k")


def test_limiters_of_several_networks_share_buckets_and_counters() -> None:
    """What one network takes, the other lacks. A network with a segment that no bucket can hold is refused."""
    first = RateLimiter((100, 300), RateLimits(RateLimit(1, 400)), clock_ns=lambda: 0)
    second = first.for_costs((50, 100, 350))
    assert second.acquire_all("", 2) == 2
    assert first.state().tokens == second.state().tokens == 300
    assert first.acquire("", 2, 2) == 1
    assert second.acquire("", 3, 1) == 0
    second.count_wait()
    assert first.state() == second.state()
    assert first.state().refused == (1, 1)
    with pytest.raises(UsageError, match="could then never run"):
        first.for_costs((100, 501))
