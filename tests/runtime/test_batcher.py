"""The batcher: answers as the slow reference gives them, every request once, books that add up."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mexit import Runtime
from mexit.core.budget import Budget
from mexit.core.cost import Costs
from mexit.core.policy import Policy
from mexit.errors import BackendError, DeadlineExceeded, Overloaded
from mexit.runtime.allowance import Allowance, Allowances
from mexit.runtime.backends.fake import FakeBackend, images_for
from mexit.runtime.batch_costs import BatchCosts, measure, table
from mexit.runtime.batcher import Batcher
from mexit.runtime.call import BATCH, Call, Desk, Wishes
from mexit.runtime.governor import Governor
from mexit.runtime.ledger import Ledger
from mexit.runtime.plan import Plan
from mexit.runtime.reference import answer_slowly
from mexit.runtime.ticket import Ticket

SAMPLES, CLASSES, SHAPE = 50, 4, (1, 2, 2)
COSTS = (10, 30, 60)
SECOND = 10**9
CHEAP = table((1, BATCH), [[1e-4] * 3, [1.01e-4] * 3])  # a batch costs little more than a row: everybody joins
LINEAR = table((1,), [[1e-4] * 3])  # nothing is saved: nobody joins
CHEAP_THEN_LINEAR = table((1, BATCH), [[1e-4] * 3, [1.01e-4, BATCH * 1e-4, BATCH * 1e-4]])
GROUPS_OF_4 = table((1, 4), [[4e-4] * 3, [4.001e-4] * 3])
POLICIES = (
    Policy("max-probability", False, (1.0,) * 3, (1.0, 1.0)),
    Policy("max-probability", False, (1.0,) * 3, (0.0, 2.0)),
    Policy("margin", True, (1.0, 2.0, 0.5), (0.4, None)),
    Policy("max-probability", False, (1.0,) * 3, (None, None)),
)


class Hands:
    """Threads that a test moves: functions wait here until it calls them, in any order."""

    def __init__(self, seed: int = 0) -> None:
        self.waiting: list[Any] = []
        self._random = random.Random(seed)

    def start(self, work: Any) -> None:
        self.waiting.append(work)

    def move(self) -> None:
        self.waiting.pop(self._random.randrange(len(self.waiting)))()

    def finish(self) -> None:
        while self.waiting:
            self.move()


@dataclass
class House:
    """A runtime of recited logits, and what its batcher told."""

    seed: int = 0
    costs: BatchCosts = CHEAP
    governor: Governor | None = None
    workers: int = 1
    hands: Hands = field(default_factory=Hands)
    watched: list[tuple[int, tuple[str, ...], str]] = field(default_factory=list)
    heard: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.backend = FakeBackend((2 * rng.normal(size=(3, SAMPLES, CLASSES))).astype(np.float32))
        manifest = SimpleNamespace(cumulative_macs=COSTS, classes=tuple("abcd"))
        bundle: Any = SimpleNamespace(manifest=manifest, id="m")
        self.ledger = Ledger(len(COSTS), COSTS[-1])
        self.desk = Desk(
            bundle, self.backend, Costs(COSTS).under, self.ledger, self.governor, lambda _: ("c",), self._watch
        )
        runtime: Any = SimpleNamespace(backend=self.backend, governor=self.governor, bundle=bundle)
        self.batcher = Batcher(runtime, self.hands.start, self.workers, costs=self.costs, heard=self.heard.extend)

    def _watch(self, images: Any, answers: Any, plan: Any, client: str) -> None:
        assert len(images) == len(answers.reasons)
        self.watched.append((len(images), answers.reasons, client))

    def ticket(self, rows: list[int], policy: Policy = POLICIES[0], **wishes: Any) -> Ticket:
        plan = Plan(policy, None)
        return Ticket(self.desk, images_for(np.asarray(rows), SHAPE), Wishes(Budget.parse("full"), plan, **wishes))

    def send(self, rows: list[int], policy: Policy = POLICIES[0], **wishes: Any) -> Ticket:
        ticket = self.ticket(rows, policy, **wishes)
        assert ticket.pay() == 0.0
        self.batcher.submit(ticket)
        return ticket

    def rows_run(self) -> list[int]:
        return [segment.rows_run for segment in self.backend.segments]


def assert_equals_reference(house: House, rows: list[int], policy: Policy, found: Any) -> None:
    exits, probabilities = answer_slowly(house.backend, images_for(np.asarray(rows), SHAPE), policy, CLASSES)
    assert [one.exit for one in found] == exits.tolist()
    assert np.array([one.probabilities for one in found]).tolist() == probabilities.tolist()


REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=9),
        st.integers(0, len(POLICIES) - 1),
        st.sampled_from("xyz"),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(REQUESTS, st.integers(0, 10**6), st.sampled_from([CHEAP, LINEAR, GROUPS_OF_4]), st.integers(1, 3))
def test_any_requests_in_any_order_equal_the_reference(requests, seed, costs, workers) -> None:
    """Steps of work between arrivals, threads in any order, policies and clients mixed."""
    house = House(seed, costs, hands=Hands(seed), workers=workers)
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
    account = house.ledger.account()
    assert account.predictions == len(receipts) == len(house.heard) == sum(count for count, _, _ in house.watched)
    assert account.macs == sum(receipt.macs for receipt in receipts)
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
    assert [ticket.predictions[0].receipt.rows for ticket in tickets] == [1, 1]


def test_company_only_where_it_pays() -> None:
    """Merging saves runs where the table says so, up to a bound, and not for those whom a free worker can take."""

    def runs_of_segment_1(costs: BatchCosts, requests: int, workers: int = 1, rows: int = 1) -> list[int]:
        house, sizes = House(costs=costs, workers=workers), list[int]()
        run = house.backend.segments[0].run
        house.backend.segments[0].run = lambda carried: (sizes.append(carried.rows), run(carried))[1]
        tickets = [house.send([1] * rows) for _ in range(requests)]
        for work in house.hands.waiting[:]:
            work()
        house.hands.finish()
        assert all(ticket.outcome.done() for ticket in tickets)
        return sizes

    assert runs_of_segment_1(CHEAP, 10) == [10]
    assert runs_of_segment_1(LINEAR, 10) == [1] * 10
    assert runs_of_segment_1(CHEAP, 2, workers=2) == [1, 1]
    assert runs_of_segment_1(CHEAP, 3, workers=2) == [2, 1]
    assert runs_of_segment_1(CHEAP, 5, rows=20) == [60, 40]
    assert runs_of_segment_1(LINEAR, 1, rows=3) == [1, 1, 1]


@pytest.mark.parametrize("last", [1, 3], ids=["one leaves", "all go on"])
def test_nobody_is_forgotten_whose_call_found_nothing(last) -> None:
    """Every other thread comes by while the batch of segment 1 is under way, sees an empty queue and leaves."""
    house = House(costs=CHEAP_THEN_LINEAR)
    first = house.send([1], POLICIES[3], max_exit=last)
    others = [house.send([row, row], POLICIES[3]) for row in (2, 3)]
    segment = house.backend.segments[0]
    segment.run = lambda carried, run=segment.run: (come_by(house.hands), run(carried))[1]
    house.hands.finish()
    assert [one.exit for one in first.outcome.result(0)] == [last]
    assert [one.exit for ticket in others for one in ticket.outcome.result(0)] == [3] * 4


def come_by(hands: Hands) -> None:
    waiting, hands.waiting = hands.waiting, []
    for work in waiting:
        work()


def test_the_most_urgent_goes_first_and_the_furthest_of_equals() -> None:
    house, order = House(costs=LINEAR), list[int]()
    late, soon, never = (
        house.send([row], POLICIES[3], deadline_s=seconds) for row, seconds in ((1, 0.9), (2, 0.5), (3, None))
    )
    for name, ticket in enumerate((late, soon, never)):
        ticket.outcome.add_done_callback(lambda _, name=name: order.append(name))
    house.hands.waiting[0]()
    assert order == [1], "a worker takes it to its end: it is the most urgent one at every segment"
    house.hands.finish()
    assert order == [1, 0, 2]


def test_without_a_deadline_patience_ends() -> None:
    """An old request without a deadline goes before a new one with a later one."""
    house = House(costs=LINEAR)
    old = house.ticket([1])
    old.pay()
    old.due_s -= 10  # it came long ago
    new = house.send([2], deadline_s=0.9)
    house.batcher.submit(old)
    house.hands.waiting[0]()
    assert old.outcome.done()
    assert not new.outcome.done()


def test_clients_take_turns_however_much_one_of_them_sends() -> None:
    house, order = House(costs=LINEAR), list[str]()
    policy = replace(POLICIES[0], thresholds=(-1e9, None))  # everybody leaves at exit 1
    for client, deadline_s in [("hog", 0.01)] * 9 + [("clean", None)] * 2:
        ticket = house.ticket([1], policy, client=client, deadline_s=deadline_s and 0.5)
        ticket.pay()
        house.batcher.submit(ticket)
        ticket.outcome.add_done_callback(lambda _, client=client: order.append(client))
    house.hands.finish()
    assert [place for place, client in enumerate(order) if client == "clean"] == [1, 3]


def test_a_crowd_of_one_client_does_not_slow_the_batch_of_another() -> None:
    """Rows of a crowd would save 64 runs for it, and cost the other client's single row a hundredfold."""
    steep = table((1, 2, 64), [[1e-4] * 3, [1.6e-4] * 3, [64e-4] * 3])
    house, sizes = House(costs=steep), list[int]()
    run = house.backend.segments[0].run
    house.backend.segments[0].run = lambda carried: (sizes.append(carried.rows), run(carried))[1]
    house.send([1], client="clean")
    for _ in range(60):
        house.send([1], client="crowd")
    house.hands.waiting[0]()
    assert sizes[0] == 1


def test_a_client_that_left_costs_no_more_segments_and_is_counted_for_those_that_ran() -> None:
    house = House(costs=LINEAR)
    before = house.send([1, 2])
    between = house.send([3], POLICIES[3])
    assert before.outcome.cancel()
    house.backend.segments[0].run = lambda carried, run=house.backend.segments[0].run: (
        between.outcome.cancel(),
        run(carried),
    )[1]
    house.hands.finish()
    assert house.rows_run() == [1, 0, 0]
    account = house.ledger.account()
    assert (account.predictions, account.macs) == (1, COSTS[0])
    assert [(one.exit, one.reason) for one in house.heard] == [(1, "deadline")]
    with pytest.raises(CancelledError):
        between.outcome.result(0)


def test_at_the_deadline_the_deepest_exit_answers() -> None:
    house = House(costs=LINEAR)
    early = house.send([1], POLICIES[3], deadline_s=60.0)
    run = house.backend.segments[1].run

    def and_it_is_late(carried: Any) -> Any:
        early.deadline_s = time.perf_counter()
        return run(carried)

    house.backend.segments[1].run = and_it_is_late
    house.hands.finish()
    assert [(one.exit, one.reason) for one in early.outcome.result(0)] == [(2, "deadline")]
    assert house.ledger.account().macs == COSTS[1]


def test_nothing_begins_that_would_end_after_the_deadline() -> None:
    """Segment 2 takes an hour by the table: the first exit answers now, in time."""
    house = House(costs=table((1,), [[1e-4, 3600.0, 1e-4]]))
    ticket = house.send([1], POLICIES[3], deadline_s=60.0)
    house.hands.finish()
    assert [(one.exit, one.reason) for one in ticket.outcome.result(0)] == [(1, "deadline")]
    assert house.rows_run() == [1, 0, 0]
    assert time.perf_counter() < ticket.deadline_s


def test_a_deadline_that_passes_before_segment_1_is_an_error() -> None:
    house = House()
    ticket = house.send([1, 2], deadline_s=0.01, queued_s=3.0)
    other = house.send([3])
    time.sleep(0.02)
    house.hands.finish()
    with pytest.raises(
        DeadlineExceeded, match=r"30\d\d\.\d+ ms in the queue: .* before the first exit could answer"
    ):
        ticket.outcome.result(0)
    assert len(other.outcome.result(0)) == 1
    assert house.ledger.account().predictions == 1


def test_a_request_that_cannot_reach_the_first_exit_in_time_costs_nothing() -> None:
    house = House(costs=table((1,), [[3600.0, 1e-4, 1e-4]]))
    ticket = house.send([1], deadline_s=60.0)
    house.hands.finish()
    with pytest.raises(DeadlineExceeded):
        ticket.outcome.result(0)
    assert house.rows_run() == [0, 0, 0]


def test_a_request_that_has_begun_gets_exit_1_for_every_row() -> None:
    """Four rows are through segment 1 when the deadline comes; the other four answer there too."""
    house = House(costs=GROUPS_OF_4)
    ticket = house.send(list(range(8)), POLICIES[3], deadline_s=60.0)
    house.backend.segments[0].run = lambda carried, run=house.backend.segments[0].run: (
        setattr(ticket, "deadline_s", time.perf_counter()),
        run(carried),
    )[1]
    house.costs = LINEAR
    house.hands.finish()
    assert [(one.exit, one.reason) for one in ticket.outcome.result(0)] == [(1, "deadline")] * 8


def test_max_exit_is_a_bound_of_its_own_in_a_shared_batch() -> None:
    house = House()
    capped, free = house.send([1, 2], POLICIES[3], max_exit=2), house.send([1, 2], POLICIES[3])
    house.hands.waiting[0]()
    house.hands.finish()
    assert [(one.exit, one.reason) for one in capped.outcome.result(0)] == [(2, "max-exit")] * 2
    assert [(one.exit, one.reason) for one in free.outcome.result(0)] == [(3, "last")] * 2
    assert house.rows_run() == [4, 4, 2]


def frozen(overall: int, client: int | None = None) -> Governor:
    """Buckets that never refill."""
    allowed = Allowances(Allowance(1, overall), None if client is None else Allowance(1, client))
    return Governor(COSTS, allowed, clock_ns=lambda: 0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=12),
    st.integers(30, 900),
    st.sampled_from(POLICIES),
)
def test_a_governed_request_answers_as_a_call_does(rows, tokens, policy) -> None:
    """Same tokens, same rows let through, same refusals."""
    house, plain = House(governor=frozen(tokens)), House(governor=frozen(tokens))
    wishes = Wishes(Budget.parse("full"), Plan(policy, None), wait_s=0.0)
    images = images_for(np.asarray(rows), SHAPE)
    call, ticket = Call(plain.desk, images, wishes), Ticket(house.desk, images, wishes)
    try:
        call.pay()
    except Overloaded:
        with pytest.raises(Overloaded):
            ticket.pay()
        return
    assert ticket.pay() == 0.0
    expected = call.run()
    house.batcher.submit(ticket)
    house.hands.finish()
    found = ticket.outcome.result(0)
    assert [(one.exit, one.reason, one.macs) for one in found] == [
        (one.exit, one.reason, one.macs) for one in expected
    ]
    assert house.governor is not None
    assert plain.governor is not None
    assert house.governor.state() == plain.governor.state()
    assert house.ledger.account().governed == plain.ledger.account().governed


@settings(max_examples=60, deadline=None)
@given(REQUESTS, st.integers(100, 2000), st.integers(0, 10**6))
def test_the_bound_holds_and_no_token_is_lost(requests, tokens, seed) -> None:
    """Everything the governor let through was spent, by the row, and nothing else."""
    governor = frozen(tokens, tokens // 2)
    house = House(seed, governor=governor, hands=Hands(seed))
    for rows, which, client, steps in requests:
        ticket = house.ticket(rows, POLICIES[which], client=client, wait_s=0.0)
        try:
            assert ticket.pay() == 0.0
        except Overloaded:
            continue
        house.batcher.submit(ticket)
        for _ in range(min(steps, len(house.hands.waiting))):
            house.hands.move()
    house.hands.finish()
    state = governor.state()
    assert house.ledger.account().macs == tokens - state.tokens <= tokens
    run = sum(rows * macs for rows, macs in zip(house.rows_run(), (10, 20, 30), strict=True))
    assert run == house.ledger.account().macs


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
    assert house.ledger.account().predictions == 1


def test_a_closed_batcher_refuses_what_waits_and_what_comes() -> None:
    house = House(costs=LINEAR)
    waiting, under_way = house.send([1]), house.send([2], POLICIES[3], deadline_s=0.9)
    run = house.backend.segments[0].run
    house.backend.segments[0].run = lambda carried: (house.batcher.close(), run(carried))[1]
    house.hands.finish()
    after = house.send([3])
    for ticket in (waiting, under_way, after):
        with pytest.raises(Overloaded, match="the server is stopping"):
            ticket.outcome.result(0)
    assert house.ledger.account().macs == COSTS[0]


def test_no_request_is_lost_among_threads() -> None:
    """Four threads send, some leave, some have tiny deadlines, some batches break: one outcome each."""
    house = House(workers=3)
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
    assert house.ledger.account().predictions == len(house.heard)


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
    account = runtime.ledger.account()
    assert (account.predictions, account.macs) == (len(receipts), sum(one.macs for one in receipts))
    assert max(receipt.rows for receipt in receipts) > 8


def test_the_table_is_measured_in_well_under_a_second(mixed_bundle) -> None:
    runtime = Runtime.open(mixed_bundle)
    began = time.perf_counter()
    costs = measure(runtime.backend, runtime.policy().scorer(10), (1, 8, 8))
    assert time.perf_counter() - began < 1.5
    for k in (1, 2, 3):
        assert [costs.of(k, rows) for rows in range(BATCH + 1)] == sorted(costs.of(k, n) for n in range(BATCH + 1))
        assert costs.of(k, 0) == 0.0
    assert runtime.ledger.account().predictions == 0


def test_a_table_between_and_beyond_what_was_measured() -> None:
    costs = table((1, 2, 4), [[1.0, 2.0], [0.5, 4.0], [3.0, 8.0]])
    assert [costs.of(1, rows) for rows in (0, 1, 2, 3, 4, 8)] == [0.0, 1.0, 1.0, 2.0, 3.0, 6.0]
    assert costs.of(2, BATCH) == 8.0 / 4 * BATCH
    assert LINEAR.efficient_rows == 1
    assert GROUPS_OF_4.efficient_rows == 4
    assert CHEAP.efficient_rows > 50


def test_measuring_stops_in_time() -> None:
    """A slow engine is timed at one size, or few."""
    house = House()
    for segment in house.backend.segments:
        segment.run = lambda carried, run=segment.run: (time.sleep(0.03 * carried.rows), run(carried))[1]
    began = time.perf_counter()
    house.backend.segments[0].logits[:] = 0
    rows = POLICIES[0].scorer(CLASSES)
    backend: Any = SimpleNamespace(
        segments=house.backend.segments,
        carry=lambda images: house.backend.carry(images_for(np.zeros(len(images), np.int64), SHAPE)),
    )
    costs = measure(backend, rows, SHAPE, limit_s=0.2)
    assert time.perf_counter() - began < 1.5
    assert costs.of(1, 10) == pytest.approx(10 * costs.of(1, 1), rel=0.2)
