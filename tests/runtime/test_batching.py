"""Continuous batching: answers of the reference, order and size of batches, deadlines, early drop."""

from __future__ import annotations

import random
import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import numpy as np
import pytest
from hand_run_batcher import BUDGETS, FLAT, LINEAR, REQUESTS, SAMPLES, SHAPE, Setup
from hypothesis import given, settings
from hypothesis import strategies as st

from mexit import Prediction, Runtime
from mexit.errors import BackendError, DeadlineExceeded, Overloaded
from mexit.runtime.backends.fake import images_for
from mexit.runtime.batch_latency import BatchLatencyTable
from mexit.runtime.batching import ContinuousBatcher


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(REQUESTS, st.integers(0, 10**6), st.sampled_from([FLAT, LINEAR]), st.integers(1, 3), st.integers(1, 64))
def test_any_requests_in_any_order_equal_the_reference(
    recited_bundle, requests, seed, table, workers, max_batch
) -> None:
    """Workers run between arrivals, in any order; budgets are mixed."""
    setup = Setup(recited_bundle, seed, table, workers=workers, max_batch=max_batch)
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


def test_requests_with_different_budgets_share_every_segment(recited_bundle) -> None:
    setup = Setup(recited_bundle)
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
def test_batch_sizes(recited_bundle, table, options, requests, rows, sizes) -> None:
    setup = Setup(recited_bundle, table=table, **options)
    futures = [setup.send([1] * rows) for _ in range(requests)]
    setup.workers.finish()
    assert setup.sizes(1) == sizes
    assert all(future.done() for future in futures)


def test_a_batch_leaves_idle_workers_their_share(recited_bundle) -> None:
    setup = Setup(recited_bundle, workers=2)
    for row in range(10):
        setup.send([row])
    setup.workers.finish()
    assert setup.sizes(1)[0] == 5


def test_the_earliest_deadline_goes_first_and_runs_to_its_end(recited_bundle) -> None:
    setup, order = Setup(recited_bundle, table=LINEAR), list[str]()
    for name, deadline_ms in (("late", 900), ("soon", 500), ("none", None)):
        setup.send([1], deadline_ms=deadline_ms).add_done_callback(lambda _, name=name: order.append(name))
    setup.workers.finish()
    assert order == ["soon", "late", "none"]


def test_a_request_without_deadline_is_not_overtaken_for_ever(recited_bundle) -> None:
    setup, order = Setup(recited_bundle, table=LINEAR), list[str]()
    setup.send([1]).add_done_callback(lambda _: order.append("old"))
    setup.now_s += 10
    setup.send([1], deadline_ms=900).add_done_callback(lambda _: order.append("new"))
    setup.workers.finish()
    assert order == ["old", "new"]


def test_a_batch_grows_only_as_far_as_its_most_urgent_request_can_afford(recited_bundle) -> None:
    """Three segments: 3 s alone, 6 s in company."""
    table = BatchLatencyTable.from_times((1, 2, 64), [[1.0] * 3, [2.0] * 3, [2.1] * 3])
    setup = Setup(recited_bundle, table=table)
    urgent, other = setup.send([1], deadline_ms=4000), setup.send([2], deadline_ms=60_000)
    setup.workers.finish()
    assert setup.sizes(1) == [1, 1]
    assert [future.result(0)[0].reason for future in (urgent, other)] == ["last", "last"]


def test_max_exit_bounds_one_request_of_a_batch(recited_bundle) -> None:
    setup = Setup(recited_bundle)
    capped, free = setup.send([1, 2], max_exit=2), setup.send([1, 2])
    setup.workers.finish()
    assert [(one.exit, one.reason) for one in capped.result(0)] == [(2, "max-exit")] * 2
    assert [(one.exit, one.reason) for one in free.result(0)] == [(3, "last")] * 2
    assert setup.batches == [(1, 4), (2, 4), (3, 2)]


def test_a_segment_that_would_end_after_the_deadline_does_not_run(recited_bundle) -> None:
    setup = Setup(recited_bundle, table=BatchLatencyTable.from_times((1,), [[1.0, 3600.0, 1.0]]))
    future = setup.send([1], deadline_ms=60_000)
    setup.workers.finish()
    assert [(one.exit, one.reason) for one in future.result(0)] == [(1, "deadline")]
    assert setup.batches == [(1, 1)]


def test_a_request_that_cannot_reach_exit_1_in_time_is_refused(recited_bundle) -> None:
    setup = Setup(recited_bundle, table=LINEAR)
    late, other = setup.send([1, 2], deadline_ms=500, queued_s=3.0), setup.send([3])
    setup.now_s += 1.0
    setup.workers.finish()
    with pytest.raises(DeadlineExceeded, match=r"4000.000 ms in the queue: .* before the first exit could answer"):
        late.result(0)
    assert len(other.result(0)) == 1
    assert setup.runtime.stats.snapshot().predictions == 1


def test_at_the_deadline_the_deepest_exit_answers_and_the_others_of_the_batch_continue(recited_bundle) -> None:
    setup = Setup(recited_bundle)
    late, *others = [setup.send([row], deadline_ms=ms) for row, ms in ((0, 2000), (1, 60_000), (2, 60_000))]
    setup.before_segment = lambda k: k == 1 and setattr(setup, "now_s", 3.0)
    setup.workers.finish()
    assert [(one.exit, one.reason) for one in late.result(0)] == [(1, "deadline")]
    assert [future.result(0)[0].exit for future in others] == [3, 3]
    assert setup.batches == [(1, 3), (2, 2), (3, 2)]


def test_every_row_of_a_large_request_gets_exit_1_once_a_row_has_an_answer(recited_bundle) -> None:
    setup = Setup(recited_bundle)
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


def test_under_overload_requests_that_would_miss_are_dropped_and_the_others_share_full_batches(recited_bundle) -> None:
    """A full batch takes 3 s to the last exit; more rows wait than it takes."""
    setup = Setup(recited_bundle, table=SLOW)
    old = [setup.send([row], deadline_ms=2900) for row in range(5)]
    new = [setup.send([row], deadline_ms=8000) for row in range(8)]
    setup.workers.finish()
    for future in old:
        with pytest.raises(DeadlineExceeded, match="more requests wait than can be answered"):
            future.result(0)
    assert [future.result(0)[0].exit for future in new] == [3] * 8
    assert setup.batches == [(1, 8), (2, 8), (3, 8)]


def test_a_cancelled_request_runs_no_further_and_what_ran_is_counted(recited_bundle) -> None:
    setup = Setup(recited_bundle)
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


def test_an_error_of_the_engine_reaches_the_requests_of_the_batch_alone(recited_bundle) -> None:
    setup = Setup(recited_bundle)
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


def test_a_closed_batcher_refuses_requests(recited_bundle) -> None:
    setup = Setup(recited_bundle, table=LINEAR)
    running, waiting = setup.send([1]), setup.send([2])
    setup.before_segment = lambda _: setup.batcher.close()
    setup.workers.finish()
    after = setup.send([3])
    for future in (running, waiting, after):
        with pytest.raises(Overloaded, match="the server is stopping"):
            future.result(0)
    assert setup.runtime.stats.snapshot().macs == setup.runtime.bundle.manifest.cumulative_macs[0]


def test_many_threads_get_one_result_for_each_request(recited_bundle) -> None:
    """Four threads send; some requests are cancelled, some have tiny deadlines, some batches raise."""
    setup = Setup(recited_bundle, workers=3)
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
