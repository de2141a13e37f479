"""The batcher: who goes first, and in whose company."""

from __future__ import annotations

from dataclasses import replace

import pytest
from batcher_house import CHEAP, CHEAP_THEN_LINEAR, LINEAR, NEVER_LEAVE, POLICIES, Hands, House

from mexit.runtime.batch_costs import BatchCosts, table


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
    assert runs_of_segment_1(LINEAR, 1, rows=40) == [16, 16, 8]


@pytest.mark.parametrize("last", [1, 3], ids=["one leaves", "all go on"])
def test_nobody_is_forgotten_whose_call_found_nothing(last) -> None:
    """Every other thread comes by while the batch of segment 1 is under way, sees an empty queue and leaves."""
    house = House(costs=CHEAP_THEN_LINEAR)
    first = house.send([1], NEVER_LEAVE, max_exit=last)
    others = [house.send([row, row], NEVER_LEAVE) for row in (2, 3)]
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
        house.send([row], NEVER_LEAVE, deadline_s=seconds) for row, seconds in ((1, 0.9), (2, 0.5), (3, None))
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


def test_survivors_of_different_requests_share_the_next_segment() -> None:
    """The one that comes meanwhile is more urgent: it catches up, and all go on together."""
    house = House()
    early = [house.send([row], NEVER_LEAVE, deadline_s=0.9) for row in (1, 2)]
    late = []
    house.before(1, lambda _: late or late.append(house.send([3], NEVER_LEAVE, deadline_s=0.5)))
    first, second = house.sizes(1), house.sizes(2)
    house.hands.finish()
    assert first == [2, 1]
    assert second == [3]
    assert all(ticket.outcome.result(0)[0].exit == 3 for ticket in (*early, *late))


def test_a_client_takes_its_turn_with_rows_that_travel_with_anothers() -> None:
    """Rows of both share segment 1; the crowd's later ones, however urgent, do not keep the other's waiting."""
    house, order = House(costs=CHEAP_THEN_LINEAR), list[str]()
    clean = house.send([1], NEVER_LEAVE, client="clean", deadline_s=0.9)
    clean.outcome.add_done_callback(lambda _: order.append("clean"))
    for row in range(9):
        ticket = house.send([row], NEVER_LEAVE, client="crowd", deadline_s=0.5)
        ticket.outcome.add_done_callback(lambda _: order.append("crowd"))
    house.hands.finish()
    assert order.index("clean") <= 9
