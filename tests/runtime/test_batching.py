"""Continuous batching: answers of the reference, order and size of batches, deadlines, early drop, tokens."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mexit import Bundle, Prediction, Runtime
from mexit.errors import BackendError, DeadlineExceeded, Overloaded
from mexit.runtime.backends.base import HostCarried
from mexit.runtime.backends.fake import FakeBackend, images_for
from mexit.runtime.batch_latency import BatchLatencyTable
from mexit.runtime.batching import ContinuousBatcher
from mexit.runtime.rate_limiter import RateLimit, RateLimiter, RateLimits, segment_macs
from mexit.runtime.reference import answer_slowly

SAMPLES, CLASSES, SHAPE = 50, 10, (1, 8, 8)
THRESHOLDS = {"low": (0.3, 0.3), "medium": (1.0, None), "high": (None, 1.0)}
REJECT = {"low": (0.2, 0.2, 2.0), "medium": (0.5, 1.0, 1.0), "high": None}
BUDGETS = (*THRESHOLDS, "full")
FLAT = BatchLatencyTable.from_times((1, 64), [[1e-3] * 3, [1.01e-3] * 3])  # large batches are efficient
LINEAR = BatchLatencyTable.from_times((1,), [[1e-3] * 3])  # a batch saves nothing
REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=9),
        st.sampled_from(BUDGETS),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=8,
)


@pytest.fixture(scope="module", params=["margin", "ensemble"])
def bundle(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory, request) -> Bundle:
    """The digits bundle with policies of the fake engine."""
    path = Path(shutil.copytree(digits_bundle, tmp_path_factory.mktemp("fake") / "digits"))
    bundle = Bundle.open(path)
    policies = bundle.policies()
    [entry] = policies.entries
    point = entry.frontier[0]
    frontier = tuple(
        replace(point, budget_macs=place, thresholds=thresholds, reject=REJECT[name])
        for place, (name, thresholds) in enumerate(THRESHOLDS.items(), start=1)
    )
    fake = replace(
        entry,
        engine="fake",
        measure="margin",
        ensemble=request.param == "ensemble",
        temperatures=(1.0, 2.0, 0.5),
        frontier=frontier,
        named={name: place for place, name in enumerate(THRESHOLDS)},
        certificates=(),
        drift={"alpha": 0.01, "rates": [0.9] * len(frontier)},
    )
    bundle.save_policies(policies.with_entry(fake))
    return bundle


class Workers:
    """Threads that a test runs by hand: functions wait here until the test calls them."""

    def __init__(self, seed: int = 0) -> None:
        self.waiting: list[Callable[[], None]] = []
        self._random = random.Random(seed)

    def start(self, work: Callable[[], None]) -> None:
        self.waiting.append(work)

    def step(self) -> None:
        self.waiting.pop(self._random.randrange(len(self.waiting)))()

    def finish(self) -> None:
        while self.waiting:
            self.step()


class Setup:
    """A runtime of recited logits, a batcher, and a clock that moves by the latency table."""

    def __init__(
        self,
        bundle: Bundle,
        seed: int = 0,
        table: BatchLatencyTable = FLAT,
        rate_limiter: RateLimiter | None = None,
        workers: int = 1,
        **options: Any,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.backend = FakeBackend((2 * rng.normal(size=(3, SAMPLES, CLASSES))).astype(np.float32))
        self.now_s, self.table = 0.0, table
        self.batches: list[tuple[int, int]] = []
        self.before_segment: Callable[[int], Any] = lambda _: None
        for k, segment in enumerate(self.backend.segments, start=1):
            segment.run = self._timed(k, segment.run)  # type: ignore[method-assign]
        self.runtime = Runtime(bundle, self.backend, "full", rate_limiter=rate_limiter)
        self.workers, self.counted = Workers(seed), list[Prediction]()
        self.batcher = ContinuousBatcher(
            self.runtime,
            self.workers.start,
            workers,
            table=table,
            on_predictions=self.counted.extend,
            clock=lambda: self.now_s,
            **options,
        )

    def _timed(self, k: int, run: Callable[[HostCarried], Any]) -> Callable[[HostCarried], Any]:
        def run_and_wait(carried: HostCarried) -> Any:
            self.before_segment(k)
            self.batches.append((k, carried.rows))
            self.now_s += self.table.segment_s(k, carried.rows)
            return run(carried)

        return run_and_wait

    def send(self, rows: Sequence[int], budget: str = "full", **options: Any) -> Future[list[Prediction]]:
        request = self.runtime.begin(images_for(np.asarray(rows), SHAPE), budget=budget, **options)
        request.start_s = self.now_s
        assert request.acquire_tokens() == 0.0
        return self.batcher.submit(request)

    def sizes(self, k: int) -> list[int]:
        """Rows of each batch of segment k."""
        return [rows for segment, rows in self.batches if segment == k]

    def check(self, rows: Sequence[int], budget: str, predictions: Sequence[Prediction]) -> None:
        """The predictions are those of the reference."""
        images = images_for(np.asarray(rows), SHAPE)
        exits, probabilities, unsure = answer_slowly(self.backend, images, self.runtime.policy(budget), CLASSES)
        assert [one.exit for one in predictions] == exits.tolist()
        for one, expected in zip(predictions, probabilities, strict=True):
            np.testing.assert_array_equal(one.probabilities, expected)
        reasons = ["last" if k == 3 else "confident" for k in exits.tolist()]
        expected_reasons = ["unsure" if one else reason for one, reason in zip(unsure, reasons, strict=True)]
        assert [one.reason for one in predictions] == expected_reasons
        assert [one.label is None for one in predictions] == unsure.tolist()


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(REQUESTS, st.integers(0, 10**6), st.sampled_from([FLAT, LINEAR]), st.integers(1, 3), st.integers(1, 64))
def test_any_requests_in_any_order_equal_the_reference(bundle, requests, seed, table, workers, max_batch) -> None:
    """Workers run between arrivals, in any order; budgets are mixed."""
    setup = Setup(bundle, seed, table, workers=workers, max_batch=max_batch)
    sent = []
    for rows, budget, steps in requests:
        sent.append((rows, budget, setup.send(rows, budget, receipts=True)))
        for _ in range(min(steps, len(setup.workers.waiting))):
            setup.workers.step()
    setup.workers.finish()
    answered = [(rows, budget, future.result(0)) for rows, budget, future in sent]
    snapshot = setup.runtime.stats.snapshot()
    predictions = [one for _, _, answers in answered for one in answers]
    assert snapshot.predictions == len(predictions) == len(setup.counted)
    assert snapshot.macs == sum(one.macs for one in predictions)
    assert all(len(one.receipt.segment_us) == one.exit and one.receipt.rows >= 1 for one in predictions)
    for rows, budget, answers in answered:
        setup.check(rows, budget, answers)


def test_requests_with_different_budgets_share_every_segment(bundle) -> None:
    setup = Setup(bundle)
    sent = [([place, place + 1], BUDGETS[place % 4], setup.send([place, place + 1], BUDGETS[place % 4], receipts=True))
            for place in range(10)]  # fmt: skip
    setup.workers.finish()
    assert len(setup.batches) == 3
    assert setup.sizes(1) == [20]
    assert {one.receipt.rows for _, _, future in sent for one in future.result(0)} == {20}
    for rows, budget, future in sent:
        setup.check(rows, budget, future.result(0))


@pytest.mark.parametrize(
    ("table", "options", "requests", "rows", "sizes"),
    [
        (FLAT, {}, 10, 1, [10]),
        (FLAT, {"max_batch": 4}, 10, 1, [4, 4, 2]),
        (LINEAR, {}, 3, 1, [1, 1, 1]),
        (FLAT, {}, 2, 64, [64, 64]),
    ],
    ids=["all", "max_batch", "no gain", "large requests"],
)
def test_batch_sizes(bundle, table, options, requests, rows, sizes) -> None:
    setup = Setup(bundle, table=table, **options)
    futures = [setup.send([1] * rows) for _ in range(requests)]
    setup.workers.finish()
    assert setup.sizes(1) == sizes
    assert all(future.done() for future in futures)


def test_a_batch_leaves_idle_workers_their_share(bundle) -> None:
    setup = Setup(bundle, workers=2)
    for row in range(10):
        setup.send([row])
    setup.workers.finish()
    assert setup.sizes(1)[0] == 5


def test_the_earliest_deadline_goes_first_and_runs_to_its_end(bundle) -> None:
    setup, order = Setup(bundle, table=LINEAR), list[str]()
    for name, deadline_ms in (("late", 900), ("soon", 500), ("none", None)):
        setup.send([1], deadline_ms=deadline_ms).add_done_callback(lambda _, name=name: order.append(name))
    setup.workers.finish()
    assert order == ["soon", "late", "none"]


def test_a_request_without_deadline_is_not_overtaken_for_ever(bundle) -> None:
    setup, order = Setup(bundle, table=LINEAR), list[str]()
    setup.send([1]).add_done_callback(lambda _: order.append("old"))
    setup.now_s += 10
    setup.send([1], deadline_ms=900).add_done_callback(lambda _: order.append("new"))
    setup.workers.finish()
    assert order == ["old", "new"]


def test_a_batch_grows_only_as_far_as_its_most_urgent_request_can_afford(bundle) -> None:
    """Three segments: 3 s alone, 6 s in company."""
    table = BatchLatencyTable.from_times((1, 2, 64), [[1.0] * 3, [2.0] * 3, [2.1] * 3])
    setup = Setup(bundle, table=table)
    urgent, other = setup.send([1], deadline_ms=4000), setup.send([2], deadline_ms=60_000)
    setup.workers.finish()
    assert setup.sizes(1) == [1, 1]
    assert [future.result(0)[0].reason for future in (urgent, other)] == ["last", "last"]


def test_max_exit_bounds_one_request_of_a_batch(bundle) -> None:
    setup = Setup(bundle)
    capped, free = setup.send([1, 2], max_exit=2), setup.send([1, 2])
    setup.workers.finish()
    assert [(one.exit, one.reason) for one in capped.result(0)] == [(2, "max-exit")] * 2
    assert [(one.exit, one.reason) for one in free.result(0)] == [(3, "last")] * 2
    assert setup.batches == [(1, 4), (2, 4), (3, 2)]


def test_a_segment_that_would_end_after_the_deadline_does_not_run(bundle) -> None:
    setup = Setup(bundle, table=BatchLatencyTable.from_times((1,), [[1.0, 3600.0, 1.0]]))
    future = setup.send([1], deadline_ms=60_000)
    setup.workers.finish()
    assert [(one.exit, one.reason) for one in future.result(0)] == [(1, "deadline")]
    assert setup.batches == [(1, 1)]


def test_a_request_that_cannot_reach_exit_1_in_time_is_refused(bundle) -> None:
    setup = Setup(bundle, table=LINEAR)
    late, other = setup.send([1, 2], deadline_ms=500, queued_s=3.0), setup.send([3])
    setup.now_s += 1.0
    setup.workers.finish()
    with pytest.raises(DeadlineExceeded, match=r"4000.000 ms in the queue: .* before the first exit could answer"):
        late.result(0)
    assert len(other.result(0)) == 1
    assert setup.runtime.stats.snapshot().predictions == 1


def test_at_the_deadline_the_deepest_exit_answers_and_the_others_of_the_batch_continue(bundle) -> None:
    setup = Setup(bundle)
    late, *others = [setup.send([row], deadline_ms=ms) for row, ms in ((0, 2000), (1, 60_000), (2, 60_000))]
    setup.before_segment = lambda k: k == 1 and setattr(setup, "now_s", 3.0)
    setup.workers.finish()
    assert [(one.exit, one.reason) for one in late.result(0)] == [(1, "deadline")]
    assert [future.result(0)[0].exit for future in others] == [3, 3]
    assert setup.batches == [(1, 3), (2, 2), (3, 2)]


def test_every_row_of_a_large_request_gets_exit_1_once_a_row_has_an_answer(bundle) -> None:
    setup = Setup(bundle)
    request = setup.runtime.begin(images_for(np.arange(70) % SAMPLES, SHAPE), deadline_ms=500)
    request.start_s = setup.now_s
    for late_s in (0.0, 60.0):
        setup.now_s += late_s
        request.acquire_tokens()
        future = setup.batcher.submit(request)
        setup.workers.finish()
    assert [(one.exit, one.reason) for one in future.result(0)] == [(1, "deadline")] * 6
    assert len(request.predictions) == 70


SLOW = BatchLatencyTable.from_times((1, 8), [[1.0] * 3, [1.001] * 3])  # batches of 8 are efficient


def test_under_overload_requests_that_would_miss_are_dropped_and_the_others_share_full_batches(bundle) -> None:
    """A full batch takes 3 s to the last exit; more rows wait than it takes."""
    setup = Setup(bundle, table=SLOW)
    old = [setup.send([row], deadline_ms=2900) for row in range(5)]
    new = [setup.send([row], deadline_ms=8000) for row in range(8)]
    setup.workers.finish()
    for future in old:
        with pytest.raises(DeadlineExceeded, match="more requests wait than can be answered"):
            future.result(0)
    assert [future.result(0)[0].exit for future in new] == [3] * 8
    assert setup.batches == [(1, 8), (2, 8), (3, 8)]


def test_a_cancelled_request_runs_no_further_and_what_ran_is_counted(bundle) -> None:
    setup = Setup(bundle)
    cost = setup.runtime.bundle.manifest.cumulative_macs[0]
    before, between, other = setup.send([1]), setup.send([2]), setup.send([3], max_exit=1)
    before.cancel()
    setup.before_segment = lambda _: between.cancel()
    setup.workers.finish()
    for future in (before, between):
        with pytest.raises(CancelledError):
            future.result(0)
    assert len(other.result(0)) == 1
    assert setup.runtime.stats.snapshot().macs == 2 * cost
    assert setup.batches == [(1, 2)]


def test_an_error_of_the_engine_reaches_the_requests_of_the_batch_alone(bundle) -> None:
    setup = Setup(bundle)
    failing = [setup.send([1]), setup.send([2])]

    def fail(_: int) -> None:
        raise BackendError("broken")

    setup.before_segment = fail
    setup.workers.step()
    setup.before_segment = lambda _: None
    other = setup.send([3])
    setup.workers.finish()
    for future in failing:
        with pytest.raises(BackendError, match="broken"):
            future.result(0)
    setup.check([3], "full", other.result(0))
    assert setup.runtime.stats.snapshot().predictions == 1


def test_a_closed_batcher_refuses_requests(bundle) -> None:
    setup = Setup(bundle, table=LINEAR)
    running, waiting = setup.send([1]), setup.send([2])
    setup.before_segment = lambda _: setup.batcher.close()
    setup.workers.finish()
    after = setup.send([3])
    for future in (running, waiting, after):
        with pytest.raises(Overloaded, match="the server is stopping"):
            future.result(0)
    assert setup.runtime.stats.snapshot().macs == setup.runtime.bundle.manifest.cumulative_macs[0]


def limiter(bundle: Bundle, macs: int) -> RateLimiter:
    """A bucket that holds `macs` and does not refill."""
    limits = RateLimits(RateLimit(1, macs))
    return RateLimiter(bundle.manifest.cumulative_macs, limits, clock_ns=lambda: 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=12), st.floats(1, 20), st.sampled_from(BUDGETS))
def test_a_rate_limited_request_answers_as_the_runtime_does(bundle, rows, images, budget) -> None:
    macs = int(images * bundle.manifest.cumulative_macs[-1])
    setup, plain = (Setup(bundle, rate_limiter=limiter(bundle, macs)) for _ in range(2))
    try:
        expected = plain.runtime.answer_tensor(images_for(np.asarray(rows), SHAPE), budget=budget, wait_ms=0)
    except Overloaded:
        with pytest.raises(Overloaded):
            setup.send(rows, budget, wait_ms=0)
        return
    future = setup.send(rows, budget, wait_ms=0)
    setup.workers.finish()
    found = [(one.exit, one.reason, one.macs, one.probabilities.tolist()) for one in future.result(0)]
    assert found == [(one.exit, one.reason, one.macs, one.probabilities.tolist()) for one in expected]
    states = [one.runtime.rate_limiter.state() for one in (setup, plain)]
    assert states[0] == states[1]


@settings(max_examples=50, deadline=None)
@given(REQUESTS, st.floats(1, 30), st.integers(0, 10**6))
def test_the_computed_macs_are_those_of_the_tokens(bundle, requests, images, seed) -> None:
    macs = int(images * bundle.manifest.cumulative_macs[-1])
    rate_limiter = limiter(bundle, macs)
    setup = Setup(bundle, seed, rate_limiter=rate_limiter)
    for rows, budget, steps in requests:
        try:
            setup.send(rows, budget, wait_ms=0)
        except Overloaded:
            continue
        for _ in range(min(steps, len(setup.workers.waiting))):
            setup.workers.step()
    setup.workers.finish()
    segments = segment_macs(bundle.manifest.cumulative_macs)
    computed = sum(rows * segments[k - 1] for k, rows in setup.batches)
    assert setup.runtime.stats.snapshot().macs == computed == macs - rate_limiter.state().tokens


def test_many_threads_get_one_result_for_each_request(bundle) -> None:
    """Four threads send; some requests are cancelled, some have tiny deadlines, some batches raise."""
    setup = Setup(bundle, workers=3)
    failures = random.Random(1)

    def sometimes(_: int) -> None:
        if failures.random() < 0.05:
            raise BackendError("broken")

    setup.before_segment = sometimes
    with ThreadPoolExecutor(3) as pool:
        batcher = ContinuousBatcher(setup.runtime, pool.submit, 3, table=FLAT, on_predictions=setup.counted.extend)
        futures: list[Future[list[Prediction]]] = []

        def send(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(100):
                images = images_for(np.array([rng.randrange(SAMPLES) for _ in range(rng.randint(1, 9))]), SHAPE)
                options = {"budget": rng.choice(BUDGETS), "deadline_ms": rng.choice([None, None, 0.1, 1e4])}
                request = setup.runtime.begin(images, **options)
                request.acquire_tokens()
                futures.append(batcher.submit(request))
                if rng.random() < 0.1:
                    futures[-1].cancel()

        threads = [threading.Thread(target=send, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for future in futures:
            if not future.cancelled():
                future.exception(30)
    answers = [future.result() for future in futures if not future.cancelled() and not future.exception()]
    assert len(futures) == 400
    assert min(len(answers), sum(future.cancelled() for future in futures)) > 0
    assert setup.runtime.stats.snapshot().predictions == len(setup.counted) >= sum(map(len, answers))


def test_a_real_bundle_with_a_measured_table_answers_as_its_runtime_does(mixed_bundle, test_digits) -> None:
    runtime, plain = Runtime.open(mixed_bundle), Runtime.open(mixed_bundle)
    runtime.watch_drift(1.0, seed=0)
    tensor = runtime.prepare(list(test_digits[0]))
    expected = {budget: plain.answer_tensor(tensor, budget=budget) for budget in BUDGETS}
    rng = np.random.default_rng(0)
    with ThreadPoolExecutor(2) as pool:
        batcher, sent = ContinuousBatcher(runtime, pool.submit, 2), []
        for place in range(200):
            rows = np.arange(rng.integers(1, 9)) + rng.integers(0, len(tensor) - 9)
            request = runtime.begin(tensor[rows], budget=BUDGETS[place % 4])
            request.acquire_tokens()
            sent.append((rows, BUDGETS[place % 4], batcher.submit(request)))
        answered = [(rows, budget, future.result(20)) for rows, budget, future in sent]
    for rows, budget, predictions in answered:
        for row, one in zip(rows, predictions, strict=True):
            alone = expected[budget][row]
            assert (one.index, one.exit, one.reason) == (alone.index, alone.exit, alone.reason)
            np.testing.assert_array_equal(one.probabilities, alone.probabilities)
    runtime.drift_watch.join()
    assert runtime.stats.snapshot().watch_macs > 0
