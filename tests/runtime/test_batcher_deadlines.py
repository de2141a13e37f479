"""The batcher at deadlines: what has been computed answers, and nothing runs that nobody waits for."""

from __future__ import annotations

import time
from concurrent.futures import CancelledError
from typing import Any

import pytest
from batcher_house import COSTS, LINEAR, NEVER_LEAVE, House

from mexit.errors import DeadlineExceeded
from mexit.runtime.batch_costs import table
from mexit.runtime.request import BATCH


def test_a_client_that_left_costs_no_more_segments_and_is_counted_for_those_that_ran() -> None:
    house = House(costs=LINEAR)
    before = house.send([1, 2])
    between = house.send([3], NEVER_LEAVE)
    assert before.outcome.cancel()
    house.backend.segments[0].run = lambda carried, run=house.backend.segments[0].run: (
        between.outcome.cancel(),
        run(carried),
    )[1]
    house.hands.finish()
    assert house.rows_run() == [1, 0, 0]
    snapshot = house.stats.snapshot()
    assert (snapshot.predictions, snapshot.macs) == (1, COSTS[0])
    assert [(one.exit, one.reason) for one in house.heard] == [(1, "deadline")]
    with pytest.raises(CancelledError):
        between.outcome.result(0)


def test_at_the_deadline_the_deepest_exit_answers() -> None:
    house = House(costs=LINEAR)
    early = house.send([1], NEVER_LEAVE, deadline_s=60.0)
    run = house.backend.segments[1].run

    def and_it_is_late(carried: Any) -> Any:
        early.deadline_s = time.perf_counter()
        return run(carried)

    house.backend.segments[1].run = and_it_is_late
    house.hands.finish()
    assert [(one.exit, one.reason) for one in early.outcome.result(0)] == [(2, "deadline")]
    assert house.stats.snapshot().macs == COSTS[1]


def test_nothing_begins_that_would_end_after_the_deadline() -> None:
    """Segment 2 takes an hour by the table: the first exit answers now, in time."""
    house = House(costs=table((1,), [[1e-4, 3600.0, 1e-4]]))
    ticket = house.send([1], NEVER_LEAVE, deadline_s=60.0)
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
    assert house.stats.snapshot().predictions == 1


def test_a_request_that_cannot_reach_the_first_exit_in_time_costs_nothing() -> None:
    house = House(costs=table((1,), [[3600.0, 1e-4, 1e-4]]))
    ticket = house.send([1], deadline_s=60.0)
    house.hands.finish()
    with pytest.raises(DeadlineExceeded):
        ticket.outcome.result(0)
    assert house.rows_run() == [0, 0, 0]


def test_a_request_that_has_begun_gets_exit_1_for_every_row() -> None:
    """Half of the rows are through segment 1 when the deadline comes; the others answer there too."""
    house = House(costs=LINEAR)
    sizes = house.sizes(1)
    ticket = house.send(list(range(32)), NEVER_LEAVE, deadline_s=60.0)
    house.before(1, lambda _: setattr(ticket, "deadline_s", time.perf_counter()))
    house.hands.finish()
    assert sizes == [16, 16]
    assert [(one.exit, one.reason) for one in ticket.outcome.result(0)] == [(1, "deadline")] * 32


def test_in_company_only_those_who_are_late_stop() -> None:
    """Of four that share segment 1 one leaves the server and one is late by then; the others go on."""
    house = House()
    gone, late, *others = [house.send([row], NEVER_LEAVE, deadline_s=60.0) for row in range(4)]
    house.before(1, lambda _: (gone.outcome.cancel(), setattr(late, "deadline_s", time.perf_counter())))
    house.hands.finish()
    assert [(one.exit, one.reason) for one in late.outcome.result(0)] == [(1, "deadline")]
    assert [one.exit for ticket in others for one in ticket.outcome.result(0)] == [3, 3]
    assert house.rows_run() == [4, 2, 2]
    assert house.stats.snapshot().macs == 2 * COSTS[0] + 2 * COSTS[2]


def test_one_batch_that_the_system_held_up_does_not_close_the_door() -> None:
    """Nor do many: as nothing runs while all are refused, what was learnt fades, and somebody is let in again."""
    house = House(costs=LINEAR, learns=True)
    outlook = house.batcher._outlook
    outlook.learn(1, 1, 1e-4, 60.0, 1)
    assert outlook.segment_s(1, 1) < 1.5e-4
    for _ in range(60):
        outlook.learn(1, 1, 60.0, 60.0, 1)
    assert outlook.segment_s(1, 1) > 0.1
    for _ in range(200):
        ticket = house.send([1], NEVER_LEAVE, deadline_s=0.1)
        house.hands.finish()
        if ticket.outcome.exception(0) is None:
            return
    pytest.fail("everybody is refused for ever")


SLOW = table((1, BATCH), [[1.0] * 3, [1.001] * 3])  # seconds: what is too late is so whatever this machine does


def test_of_too_many_the_oldest_are_refused_and_the_others_travel_together() -> None:
    """Three seconds to the end, four at most: a batch of those that have two would make all of them late."""
    house = House(costs=SLOW)
    old = [house.send([row], NEVER_LEAVE, deadline_s=2.0) for row in range(5)]
    new = [house.send([row], NEVER_LEAVE, deadline_s=6.0) for row in range(20)]
    house.hands.finish()
    for ticket in old:
        with pytest.raises(DeadlineExceeded, match="more requests wait than can be answered"):
            ticket.outcome.result(0)
    assert [one.exit for ticket in new for one in ticket.outcome.result(0)] == [3] * 20
    assert house.rows_run() == [20, 20, 20]


def test_one_in_a_hurry_is_served_first_where_the_others_can_wait() -> None:
    house = House(costs=SLOW)
    crowd = [house.send([row], NEVER_LEAVE, deadline_s=600.0) for row in range(20)]
    hurried = house.ticket([1], NEVER_LEAVE, deadline_s=3.5)
    hurried.due_s -= 1.0  # more urgent than all of them
    hurried.pay()
    house.batcher.submit(hurried)
    house.hands.finish()
    assert [one.exit for ticket in (hurried, *crowd) for one in ticket.outcome.result(0)] == [3] * 21


def test_a_crowd_of_one_client_does_not_cost_another_its_place() -> None:
    """The crowd has more than can be done in time; the other client's only request is not refused for that."""
    house = House(costs=SLOW)
    crowd = [house.send([1], NEVER_LEAVE, client="crowd", deadline_s=2.0) for _ in range(5)]
    other = house.send([1], NEVER_LEAVE, client="clean", deadline_s=2.5)
    crowd += [house.send([1], NEVER_LEAVE, client="crowd", deadline_s=6.0) for _ in range(20)]
    house.hands.finish()
    assert [ticket.outcome.exception(0) is None for ticket in crowd] == [False] * 5 + [True] * 20
    assert other.outcome.exception(0) is None
