"""A queue whose producer never waits."""

from __future__ import annotations

import threading

from mexit.camera.outputs.bounded_queue import BoundedQueue


def drained(queue: BoundedQueue[int]) -> list[int | None]:
    queue.close()
    return [queue.take() for _ in range(len(queue) + 1)]


def test_the_oldest_item_makes_room_and_is_counted() -> None:
    queue: BoundedQueue[int] = BoundedQueue(3)
    for i in range(5):
        queue.put(i)
    assert queue.lost == 2
    assert drained(queue) == [2, 3, 4, None]


def test_a_key_replaces_the_waiting_item_and_nothing_is_lost() -> None:
    queue: BoundedQueue[int] = BoundedQueue(3)
    queue.put(1, key="a")
    queue.put(2)
    queue.put(3, key="b")
    queue.put(4, key="a")
    assert (queue.lost, queue.replaced) == (0, 1)
    assert drained(queue) == [2, 3, 4, None]


def test_a_key_can_come_again_once_its_item_was_taken() -> None:
    queue: BoundedQueue[int] = BoundedQueue(3)
    queue.put(1, key="a")
    assert queue.take() == 1
    queue.put(2, key="a")
    assert (queue.take(), queue.replaced) == (2, 0)


def test_a_closed_queue_counts_what_comes_later() -> None:
    queue: BoundedQueue[int] = BoundedQueue(3)
    queue.put(1)
    queue.close()
    queue.put(2)
    assert queue.lost == 1
    assert (queue.take(), queue.take()) == (1, None)


def test_clearing_counts_what_waited() -> None:
    queue: BoundedQueue[int] = BoundedQueue(3)
    queue.put(1)
    queue.put(2, key="a")
    queue.clear()
    assert (queue.lost, len(queue)) == (2, 0)


def test_a_waiting_consumer_gets_the_next_item_and_the_end() -> None:
    queue: BoundedQueue[int] = BoundedQueue(3)
    taken: list[int | None] = []
    thread = threading.Thread(target=lambda: taken.extend([queue.take(), queue.take()]))
    thread.start()
    queue.put(1)
    queue.close()
    thread.join(60)
    assert taken == [1, None]
