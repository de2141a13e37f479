"""Delivery in a thread of its own: a receiver that hangs or fails costs its items and nothing else."""

from __future__ import annotations

import threading

import pytest

from mexit.camera.outputs.background_sender import BackgroundSender


def test_every_item_is_delivered_in_order_before_the_end() -> None:
    delivered: list[int] = []
    sender: BackgroundSender[int] = BackgroundSender("test", lambda item: delivered.append(item) is None)
    for i in range(100):
        sender.put(i)
    sender.close(timeout_s=60)
    assert delivered == list(range(100))
    assert (sender.delivered, sender.lost) == (100, 0)


def test_a_receiver_that_hangs_delays_no_put() -> None:
    release, entered = threading.Event(), threading.Event()

    def deliver(item: int) -> bool:
        entered.set()
        return release.wait(60)

    sender: BackgroundSender[int] = BackgroundSender("test", deliver, size=10)
    sender.put(-1)
    assert entered.wait(60)
    for i in range(50):
        sender.put(i)
    assert (sender.delivered, sender.lost) == (0, 40)
    release.set()
    sender.close(timeout_s=60)
    assert (sender.delivered, sender.lost) == (11, 40)


def test_closing_gives_up_an_item_that_hangs() -> None:
    release, entered = threading.Event(), threading.Event()

    def deliver(item: int) -> bool:
        entered.set()
        return release.wait(60)

    sender: BackgroundSender[int] = BackgroundSender("test", deliver, size=10)
    for i in range(5):
        sender.put(i)
    assert entered.wait(60)
    sender.close(timeout_s=0.0)
    assert (sender.delivered, sender.lost) == (0, 5)
    release.set()


def test_closing_tells_a_waiting_delivery_to_stop() -> None:
    sender: BackgroundSender[int] = BackgroundSender("test", lambda _: not sender.stopping.wait(60))
    sender.put(1)
    sender.close(timeout_s=0.0)
    assert (sender.delivered, sender.lost) == (0, 1)


def test_an_error_costs_one_item_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def deliver(item: int) -> bool:
        return 1 / item > 0

    sender: BackgroundSender[int] = BackgroundSender("the-sender", deliver)
    for i in (1, 0, 2):
        sender.put(i)
    sender.close(timeout_s=60)
    assert (sender.delivered, sender.lost) == (2, 1)
    assert "the-sender" in caplog.text
    assert "ZeroDivisionError" in caplog.text
