"""The rate limiter: what is spent in any window stays within burst + rate * T, exactly, and nothing else changes."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mexit.core.policy import Policy
from mexit.errors import UsageError
from mexit.runtime.backends.base import HostCarried
from mexit.runtime.backends.fake import FakeBackend, images_for
from mexit.runtime.engine import answer
from mexit.runtime.rate_limiter import RateLimiter
from mexit.runtime.rate_limits import RateLimit, RateLimits, parse_macs, read_rate_limits
from mexit.runtime.reference import answer_slowly

COSTS = (3, 10, 24)
SEGMENTS = (3, 7, 14)
SECOND = 10**9
ALLOWANCE = st.builds(RateLimit, st.integers(1, 60), st.integers(14, 90))
CLIENT = st.sampled_from("abcd")
PAUSE, ROWS = st.integers(0, 3 * SECOND), st.integers(0, 12)
ASK = st.tuples(CLIENT, PAUSE, st.integers(1, 3), ROWS)
ANY_ASK = st.tuples(CLIENT, PAUSE, st.integers(1, 4), ROWS)  # segment 1 of a batch, 2, 3, the drift watch


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns


def worst_excess(spent: Iterable[tuple[int, int]], allowed: RateLimit) -> int:
    """By how much the worst window of (time in ns, MACs) exceeds its bound, in billionths of a MAC; 0 if none.

    For a window from event i to event j the excess is S(j) - S(i-1) - rate (t(j) - t(i)) - burst; the largest one
    for each j needs only the smallest S(i-1) - rate t(i) so far.
    """
    worst, total, lowest = 0, 0, None
    for at_ns, macs in spent:
        start = total - allowed.rate * at_ns
        lowest = start if lowest is None else min(lowest, start)
        total += macs * SECOND
        worst = max(worst, total - allowed.rate * at_ns - lowest - allowed.burst * SECOND)
    return worst


@settings(max_examples=300, deadline=None)
@given(st.none() | ALLOWANCE, st.none() | ALLOWANCE, st.integers(1, 5), st.lists(ANY_ASK, max_size=60))
def test_no_window_ever_holds_more_than_its_bound(overall, each, max_clients, asks) -> None:
    """Whoever asks for whatever whenever, however few clients the table holds."""
    clock = Clock()
    rate_limiter = RateLimiter(COSTS, RateLimits(overall, each), clock_ns=clock, max_clients=max_clients)
    spent = []
    for client, pause_ns, k, rows in asks:
        clock.ns += pause_ns
        ask = {1: rate_limiter.begin, 4: rate_limiter.watch}.get(
            k, lambda name, wish, k=k: rate_limiter.enter(name, k, wish)
        )
        read_limits = ask(client, rows)
        assert 0 <= read_limits <= rows
        spent.append((client, clock.ns, read_limits * {**dict(enumerate(SEGMENTS, 1)), 4: COSTS[-1]}[k]))
    if overall is not None:
        assert worst_excess([(at_ns, macs) for _, at_ns, macs in spent], overall) <= 0
    for name in "abcd" if each is not None else "":
        assert worst_excess([(at_ns, macs) for client, at_ns, macs in spent if client == name], each) <= 0
    assert rate_limiter.state().clients <= max_clients


@settings(max_examples=200, deadline=None)
@given(ALLOWANCE, ALLOWANCE, st.lists(ASK, max_size=40))
def test_it_grants_as_much_as_exact_buckets_hold(overall, each, asks) -> None:
    """Refusing everything would be safe, too. Fractions of a second, and a bucket for everybody, kept for ever."""
    clock = Clock()
    rate_limiter = RateLimiter(COSTS, RateLimits(overall, each), clock_ns=clock)
    levels = {"": Fraction(overall.burst), **dict.fromkeys("abcd", Fraction(each.burst))}
    for client, pause_ns, k, rows in asks:
        clock.ns += pause_ns
        for name, level in levels.items():
            limit = each if name else overall
            levels[name] = min(Fraction(limit.burst), level + Fraction(limit.rate * pause_ns, SECOND))
        expected = min(rows, *(int(levels[name] // SEGMENTS[k - 1]) for name in ("", client)))
        assert rate_limiter.enter(client, k, rows) == expected
        for name in ("", client):
            levels[name] -= expected * SEGMENTS[k - 1]
        assert rate_limiter.state().tokens == int(levels[""])


@settings(max_examples=100, deadline=None)
@given(ALLOWANCE, st.none() | ALLOWANCE, st.integers(0, 2 * SECOND), st.integers(1, 4))
def test_the_wait_is_exact_to_the_nanosecond(overall, each, pause_ns, rows) -> None:
    """As many rows as asked for have begun at that time, one after the other, and not a nanosecond before."""
    clock = Clock()
    rate_limiter = RateLimiter(COSTS, RateLimits(overall, each), clock_ns=clock)
    while rate_limiter.enter("a", 1, 1):
        pass
    clock.ns += pause_ns
    wait_ns = round(rate_limiter.wait_s("a", rows) * SECOND)
    waits = [round(rate_limiter.wait_s("a", count) * SECOND) for count in range(1, rows + 1)]
    assert waits[-1] == wait_ns
    start_ns, begun = clock.ns, 0
    for wait in waits:
        if wait:
            clock.ns = start_ns + wait - 1
            begun += rate_limiter.enter("a", 1, 1)
        clock.ns = start_ns + wait
        begun += rate_limiter.enter("a", 1, 1)
    assert begun == rows
    assert clock.ns == start_ns + wait_ns


def test_tokens_are_taken_from_both_buckets_or_none() -> None:
    rate_limiter = RateLimiter(COSTS, RateLimits(RateLimit(1, 14), RateLimit(1, 100)), clock_ns=Clock())
    assert rate_limiter.enter("a", 3, 5) == 1  # that was all there is for everybody
    assert rate_limiter.enter("b", 3, 1) == 0
    assert rate_limiter.wait_s("b") == 3
    assert rate_limiter.state().refused == (0, 5)


def test_a_batch_begins_as_a_whole_or_waits() -> None:
    clock = Clock()
    rate_limiter = RateLimiter(COSTS, RateLimits(RateLimit(3, 31), RateLimit(3, 50)), clock_ns=clock)
    assert rate_limiter.most_rows == 10
    assert rate_limiter.begin("a", 4) == 4
    assert rate_limiter.begin("a", 7) == 0
    assert rate_limiter.state().tokens == 19
    clock.ns += round(rate_limiter.wait_s("a", 7) * SECOND)
    assert rate_limiter.begin("a", 7) == 7
    clock.ns += 20 * SECOND
    assert rate_limiter.begin("a", 1000) == 10  # more than the bucket can ever hold: as many as it can


def test_one_client_cannot_spend_what_is_anothers() -> None:
    rate_limiter = RateLimiter(COSTS, RateLimits(RateLimit(10, 100), RateLimit(5, 50)), clock_ns=Clock())
    assert rate_limiter.enter("attacker", 1, 1000) == 16
    assert rate_limiter.enter("attacker", 1, 1000) == 0
    assert rate_limiter.enter("clean", 1, 16) == 16


def test_a_clock_that_goes_back_earns_nothing() -> None:
    clock = Clock()
    clock.ns = 100 * SECOND
    rate_limiter = RateLimiter(COSTS, RateLimits(RateLimit(3, 24)), clock_ns=clock)
    assert rate_limiter.enter("a", 1, 9) == 8
    clock.ns = 0
    assert rate_limiter.enter("a", 1, 9) == 0
    clock.ns = 101 * SECOND
    assert rate_limiter.enter("a", 1, 9) == 1


def test_names_made_up_on_the_way_gain_nothing_once_the_table_is_full() -> None:
    clock = Clock()
    rate_limiter = RateLimiter(COSTS, RateLimits(None, RateLimit(1, 30)), clock_ns=clock, max_clients=2)
    assert [rate_limiter.enter(f"name {i}", 1, 10) for i in range(6)] == [10, 10, 10, 0, 0, 0]
    clock.ns += 30 * SECOND  # everybody has earned everything back
    assert [rate_limiter.enter(f"other {i}", 1, 10) for i in range(3)] == [10, 10, 10]
    assert rate_limiter.state().clients == 2


def test_a_place_in_the_table_is_no_new_credit() -> None:
    """A client that has spent the strangers' tokens gets a bucket of its own later, and that is as empty."""
    clock = Clock()
    rate_limiter = RateLimiter(COSTS, RateLimits(None, RateLimit(1, 30)), clock_ns=clock, max_clients=1)
    assert rate_limiter.enter("first", 1, 1) == 1
    assert rate_limiter.enter("second", 1, 10) == 10
    clock.ns += 3 * SECOND  # now the first one has earned its row back, and makes room
    assert rate_limiter.enter("second", 1, 10) == 1
    assert rate_limiter.state().clients == 1


def test_threads_together_take_what_one_could() -> None:
    rate_limiter = RateLimiter(COSTS, RateLimits(RateLimit(1, 3000), RateLimit(1, 900)), clock_ns=Clock())
    taken = dict.fromkeys("abcdefgh", 0)

    def ask(client: str) -> None:
        for _ in range(200):
            taken[client] += rate_limiter.enter(client, 1, 2)

    threads = [threading.Thread(target=ask, args=(client,)) for client in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken.values()) == 1000
    assert max(taken.values()) <= 300


class Timed:
    """A segment that writes down what it runs, and when."""

    def __init__(self, segment, macs: int, clock: Clock, spent: list[tuple[int, int]]) -> None:
        self._segment, self._macs, self._clock, self._spent = segment, macs, clock, spent

    def run(self, carried: HostCarried):
        self._spent.append((self._clock(), carried.rows * self._macs))
        return self._segment.run(carried)


BATCHES = st.lists(st.tuples(st.integers(0, SECOND), st.lists(st.integers(0, 39), max_size=9)), max_size=12)
THRESHOLDS = st.lists(st.none() | st.floats(-3, 3), min_size=2, max_size=2)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1000), THRESHOLDS, ALLOWANCE, BATCHES)
def test_a_governed_engine_keeps_the_bound_and_equals_the_reference(seed, thresholds, allowed, batches) -> None:
    """Arbitrary scores and arrivals: what the segments really ran is bounded, and every answer is right."""
    clock, spent = Clock(), list[tuple[int, int]]()
    logits = (3 * np.random.default_rng(seed).normal(size=(3, 40, 5))).astype(np.float32)
    plain, timed = FakeBackend(logits), FakeBackend(logits)
    timed.segments = tuple(Timed(*pair, clock, spent) for pair in zip(plain.segments, SEGMENTS, strict=True))
    policy = Policy("max-probability", False, (1.0,) * 3, tuple(thresholds))
    rate_limiter = RateLimiter(COSTS, RateLimits(allowed), clock_ns=clock)
    for pause_ns, rows in batches:
        clock.ns += pause_ns
        begun = rows[: rate_limiter.begin("", len(rows))]
        read_limits: dict[int, int] = {}

        def permit(k: int, wishing: int, read_limits=read_limits) -> int:
            clock.ns += 1
            return read_limits.setdefault(k, rate_limiter.enter("", k, wishing))

        images = images_for(np.asarray(begun, np.int64), (1, 2, 2))
        fast = answer(timed, images, policy, 5, permit=permit)
        exits, probabilities = answer_slowly(plain, images, policy, 5, permit=lambda k, _, g=read_limits: g[k])
        assert fast.exits.tolist() == exits.tolist()
        assert fast.probabilities.tolist() == probabilities.tolist()
        free, _ = answer_slowly(plain, images, policy, 5)
        early = [reason == "governor" for reason in fast.reasons]
        assert early == (exits < free).tolist()
    assert worst_excess(spent, allowed) <= 0


def test_the_first_rows_go_on_in_the_order_of_the_batch() -> None:
    fake = FakeBackend(np.zeros((3, 6, 5), np.float32))
    never = Policy("max-probability", False, (1.0,) * 3, (None, None))
    rows = images_for(np.arange(6), (1, 2, 2))
    answers = answer(fake, rows, never, 5, permit=lambda k, _: {2: 4, 3: 1}[k])
    assert answers.exits.tolist() == [3, 2, 2, 2, 1, 1]
    assert answers.reasons == ("last", *["governor"] * 5)
    assert len(answers.segment_seconds) == 3


def test_a_permit_is_asked_for_nobody_who_leaves_anyway() -> None:
    fake = FakeBackend(np.zeros((3, 6, 5), np.float32))
    rows = images_for(np.arange(6), (1, 2, 2))
    never, always = (Policy("margin", False, (1.0,) * 3, (threshold, None)) for threshold in (None, -1e9))

    def refuse(k: int, wishing: int) -> int:
        pytest.fail(f"asked for {wishing} rows in segment {k}")

    assert set(answer(fake, rows, always, 5, permit=refuse).reasons) == {"confident"}
    assert set(answer(fake, rows, never, 5, permit=refuse, max_exit=1).reasons) == {"max-exit"}
    assert set(answer(fake, rows, never, 5, permit=refuse, deadline_s=0.0).reasons) == {"deadline"}


@pytest.mark.parametrize(
    ("typed", "macs"),
    [("40M", 40_000_000), ("1.5G", 1_500_000_000), (" 800 k ", 800_000), ("7", 7), (7, 7), (2.5e6, 2_500_000)],
)
def test_macs_as_typed(typed, macs) -> None:
    assert parse_macs(typed, "rate") == macs


@pytest.mark.parametrize("typed", ["", "fast", "-1", "0", "0.5", "1e6", "40%", "5ms", "2000000000G", 0, -1, True])
def test_what_is_no_rate(typed) -> None:
    with pytest.raises(UsageError, match="a rate"):
        parse_macs(typed, "rate")


def test_allowances_and_their_defaults() -> None:
    costs = (100, 1000, 5000)
    assert read_rate_limits(costs) == RateLimits()
    assert read_rate_limits(costs, "20k").overall == RateLimit(20_000, 20_000)  # one second's worth
    assert read_rate_limits(costs, "2k").overall == RateLimit(2000, 5000)  # one image through the whole network
    assert read_rate_limits(costs, client_rate="2k", client_burst="4k") == RateLimits(None, RateLimit(2000, 4000))
    with pytest.raises(UsageError, match=r"less than the dearest segment costs.*at least 4000"):
        read_rate_limits(costs, "2k", "3999")
    with pytest.raises(UsageError, match="give --rate too"):
        read_rate_limits(costs, burst="2k")
    with pytest.raises(UsageError, match="give --client-rate too"):
        read_rate_limits(costs, "2k", client_burst="5k")
