"""The batcher: answers as the slow reference gives them, every request once, books that add up."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from batcher_house import (
    CHEAP,
    COSTS,
    GROUPS_OF_4,
    LINEAR,
    NEVER_LEAVE,
    POLICIES,
    REQUESTS,
    SAMPLES,
    Hands,
    House,
    assert_equals_reference,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mexit import Runtime
from mexit.errors import BackendError, Overloaded
from mexit.runtime import cohort
from mexit.runtime.batcher import Batcher
from mexit.runtime.ticket import Ticket


@settings(max_examples=150, deadline=None)
@given(
    REQUESTS,
    st.integers(0, 10**6),
    st.sampled_from([CHEAP, LINEAR, GROUPS_OF_4]),
    st.integers(1, 3),
    st.booleans(),
)
def test_any_requests_in_any_order_equal_the_reference(requests, seed, costs, workers, learns) -> None:
    """Steps of work between arrivals, threads in any order, policies and clients mixed."""
    house = House(seed, costs, hands=Hands(seed), workers=workers, learns=learns)
    sent = []
    for rows, which, client, steps in requests:
        sent.append((rows, which, house.send(rows, POLICIES[which], client=client, receipts=True)))
        for _ in range(min(steps, len(house.hands.waiting))):
            house.hands.move()
    house.hands.finish()
    receipts = []
    for rows, which, ticket in sent:
        found = ticket.outcome.result(0)
        assert ticket.done
        assert found == ticket.predictions
        assert_equals_reference(house, rows, POLICIES[which], found)
        assert all(one.reason == ("last" if one.exit == 3 else "confident") for one in found)
        receipts += [one.receipt for one in found]
    snapshot = house.stats.snapshot()
    assert snapshot.predictions == len(receipts) == len(house.heard) == sum(count for count, _, _ in house.watched)
    assert snapshot.macs == sum(receipt.macs for receipt in receipts)
    assert all(len(receipt.segment_us) == receipt.exit and receipt.rows >= 1 for receipt in receipts)


def test_receipts_say_how_many_travelled_together() -> None:
    house = House()
    tickets = [house.send([place] * count, receipts=True) for place, count in enumerate((2, 3, 4))]
    house.hands.waiting[0]()
    house.hands.finish()
    assert {one.receipt.rows for ticket in tickets for one in ticket.outcome.result(0)} == {9}
    assert len({one.receipt.segment_us[0] for ticket in tickets for one in ticket.predictions}) == 1
    alone = House(costs=LINEAR)
    tickets = [alone.send([place] * count, receipts=True) for place, count in enumerate((2, 3))]
    alone.hands.finish()
    assert [ticket.predictions[0].receipt.rows for ticket in tickets] == [2, 3]


def test_max_exit_is_a_bound_of_its_own_in_a_shared_batch() -> None:
    house = House()
    capped, free = house.send([1, 2], NEVER_LEAVE, max_exit=2), house.send([1, 2], NEVER_LEAVE)
    house.hands.waiting[0]()
    house.hands.finish()
    assert [(one.exit, one.reason) for one in capped.outcome.result(0)] == [(2, "max-exit")] * 2
    assert [(one.exit, one.reason) for one in free.outcome.result(0)] == [(3, "last")] * 2
    assert house.rows_run() == [4, 4, 2]


def test_what_the_engine_raises_reaches_all_in_the_batch_and_nobody_else() -> None:
    house = House()
    first, second = house.send([1]), house.send([2])
    run = house.backend.segments[0].run
    house.backend.segments[0].run = lambda _: (_ for _ in ()).throw(BackendError("broken"))
    house.hands.waiting[0]()
    house.backend.segments[0].run = run
    third = house.send([3])
    house.hands.finish()
    for ticket in (first, second):
        with pytest.raises(BackendError, match="broken"):
            ticket.outcome.result(0)
    assert_equals_reference(house, [3], POLICIES[0], third.outcome.result(0))
    assert house.stats.snapshot().predictions == 1


def test_a_closed_batcher_refuses_what_waits_and_what_comes() -> None:
    house = House(costs=LINEAR)
    waiting, under_way = house.send([1]), house.send([2], NEVER_LEAVE, deadline_s=0.9)
    run = house.backend.segments[0].run
    house.backend.segments[0].run = lambda carried: (house.batcher.close(), run(carried))[1]
    house.hands.finish()
    after = house.send([3])
    for ticket in (waiting, under_way, after):
        with pytest.raises(Overloaded, match="the server is stopping"):
            ticket.outcome.result(0)
    assert house.stats.snapshot().macs == COSTS[0]


def test_no_request_is_lost_among_threads() -> None:
    """Four threads send, some leave, some have tiny deadlines, some batches break: one outcome each."""
    house = House(workers=3, learns=True)
    pool = ThreadPoolExecutor(3)
    house.batcher._start = pool.submit
    breaking = random.Random(1)
    run = house.backend.segments[1].run

    def sometimes(carried: Any) -> Any:
        if breaking.random() < 0.05:
            raise BackendError("broken")
        return run(carried)

    house.backend.segments[1].run = sometimes
    outcomes: list[tuple[list[int], int, Ticket]] = []

    def send(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            rows, which = [rng.randrange(SAMPLES) for _ in range(rng.randint(1, 9))], rng.randrange(4)
            deadline_s = rng.choice([None, None, 1e-4, 10.0])
            ticket = house.send(rows, POLICIES[which], client=rng.choice("xyz"), deadline_s=deadline_s)
            if rng.random() < 0.1:
                ticket.outcome.cancel()
            outcomes.append((rows, which, ticket))
            if rng.random() < 0.2:
                time.sleep(0.002)

    senders = [threading.Thread(target=send, args=(seed,)) for seed in range(4)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    end = time.monotonic() + 20
    while not all(ticket.outcome.done() for _, _, ticket in outcomes) and time.monotonic() < end:
        time.sleep(0.01)
    pool.shutdown()
    assert [ticket.outcome.done() for _, _, ticket in outcomes] == [True] * 600
    house.backend.segments[1].run = run
    kinds: Counter[str] = Counter()
    for rows, which, ticket in outcomes:
        kind = kind_of(ticket.outcome)
        kinds[kind] += 1
        if kind == "answered" and all(one.reason != "deadline" for one in ticket.predictions):
            assert_equals_reference(house, rows, POLICIES[which], ticket.outcome.result(0))
    assert min(kinds[kind] for kind in ("answered", "CancelledError", "BackendError")) > 0
    assert house.stats.snapshot().predictions == len(house.heard)


def kind_of(outcome: Future[Any]) -> str:
    if outcome.cancelled():
        return "CancelledError"
    error = outcome.exception(0)
    return "answered" if error is None else type(error).__name__


def test_a_real_bundle_answers_as_its_runtime_does(mixed_bundle, test_digits) -> None:
    """Threads, real engine, measured table, three budgets; ledger and receipts to the MAC."""
    runtime, plain = Runtime.open(mixed_bundle), Runtime.open(mixed_bundle)
    tensor = runtime.prepare(list(test_digits[0]))
    budgets = ("low", "medium", "high", "full")
    expected = {budget: plain.answer_tensor(tensor, budget=budget) for budget in budgets}
    rng = np.random.default_rng(0)
    with ThreadPoolExecutor(2) as pool:
        batcher, sent = Batcher(runtime, pool.submit, 2), []
        for place in range(300):
            rows = np.arange(rng.integers(1, 9)) + rng.integers(0, len(tensor) - 9)
            ticket = runtime.begin(tensor[rows], budget=budgets[place % 4], receipts=True, kind=Ticket)
            assert isinstance(ticket, Ticket)
            assert ticket.pay() == 0.0
            sent.append((rows, budgets[place % 4], batcher.submit(ticket)))
        found = [(rows, budget, outcome.result(20)) for rows, budget, outcome in sent]
    for rows, budget, predictions in found:
        for row, one in zip(rows, predictions, strict=True):
            usual = expected[budget][row]
            assert (one.index, one.exit, one.reason) == (usual.index, usual.exit, usual.reason)
            np.testing.assert_array_equal(one.probabilities, usual.probabilities)
    receipts = [one.receipt for _, _, predictions in found for one in predictions]
    snapshot = runtime.stats.snapshot()
    assert (snapshot.predictions, snapshot.macs) == (len(receipts), sum(one.macs for one in receipts))
    assert max(receipt.rows for receipt in receipts) > 8


def test_a_segment_costs_one_decision_whatever_the_number_of_requests(monkeypatch) -> None:
    """Ten requests of three policies: one comparison a batch, with each row's own threshold."""
    compared, should_exit = [], cohort.should_exit

    def told(score: Any, threshold: Any) -> Any:
        compared.append(len(score))
        return should_exit(score, threshold)

    monkeypatch.setattr(cohort, "is_sure", told)
    house = House()
    sent = [([place, place + 1], POLICIES[(0, 1, 3)[place % 3]]) for place in range(10)]
    tickets = [house.send(*one) for one in sent]
    house.hands.finish()
    assert compared[0] == 20
    assert len(compared) == 2, "the last exit is not asked"
    for (rows, policy), ticket in zip(sent, tickets, strict=True):
        assert_equals_reference(house, rows, policy, ticket.outcome.result(0))
