"""The remaining time of a run counts validations and a growing attack; a run by the clock ends within its minutes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mexit.train.config import resolve
from mexit.train.run_clock import RunClock

IMAGES, SELECTION = 1000, 100
PER_IMAGE_S = 0.02


class Time:
    """A clock that the test moves."""

    now = 5000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr("time.monotonic", clock)
    return clock


def clock_of(**given: Any) -> RunClock:
    return RunClock(resolve("digits", None, given), 3, IMAGES, SELECTION)


def run(
    time: Time, clock: RunClock, epochs: int, cost: Callable[[float], float], validation_s: float
) -> list[tuple[float, float]]:
    """Run all epochs of a schedule, ten steps each; the remaining time and the time at each step, and the end."""
    clock.start(0.0, 0.0, 0)
    shown = []
    for step in range(10 * epochs):
        time.now += PER_IMAGE_S * IMAGES / 10 * cost(step / (10 * epochs))
        progress, ended = (step + 1) / (10 * epochs), (step + 1) // 10
        shown.append((clock.remaining_s(progress, (step + 1) * IMAGES // 10, epochs - step // 10), time.now))
        if (step + 1) % 10 == 0 and ended <= epochs:
            time.now += validation_s
            clock.add_validation(validation_s)
    return shown


@pytest.mark.parametrize("validation_s", [0.5, 8.0])
def test_the_remaining_time_of_a_run_by_epochs_is_within_a_fifth_after_the_first_minute(
    time: Time, validation_s: float
) -> None:
    start = time.now
    shown = run(time, clock_of(epochs=20, method="clean"), 20, lambda _: 1.0, validation_s)
    for remaining, at in shown:
        if at > start + 60 and time.now - at > 20:
            assert remaining == pytest.approx(time.now - at, rel=0.2)


def test_an_attack_that_grows_is_counted_from_the_beginning(time: Time) -> None:
    given = {"epochs": 20, "method": "adversarial", "attack": "max-average", "steps": 10}
    clock = clock_of(**given, short_attack_until=0.2, average_attack_until=0.6)

    def cost(progress: float) -> float:
        return (6 + 2 * 3 if progress < 0.2 else 6 + 2 * 10 if progress < 0.6 else 6 + 2 * 10 * 3) / 12

    start = time.now
    shown = run(time, clock, 20, cost, 1.0)
    checked = [(remaining, time.now - at) for remaining, at in shown if at > start + 60]
    assert all(remaining == pytest.approx(true, rel=0.2, abs=3) for remaining, true in checked)
    assert len(checked) > 100


def test_a_resumed_run_extrapolates_from_this_call(time: Time) -> None:
    clock = clock_of(epochs=10, method="clean")
    clock.start(1e6, 0.5, 5 * IMAGES)  # the first half took days
    time.now += 30
    assert clock.remaining_s(0.6, 6 * IMAGES, 4) == pytest.approx(4 * 30, rel=0.2)


def test_a_run_by_the_clock_leaves_time_for_its_end(time: Time) -> None:
    clock = clock_of(minutes=10.0, method="clean", recompute_norms=500)
    clock.start(0.0, 0.0, 0)
    assert clock.remaining_s(0.0, 0, 0) == 600
    time.now += 100
    clock.add_validation(2.0)  # of 100 images, so that 600 images at the end take 12 s
    assert clock.share(50_000) == pytest.approx(100 / (600 - 12))
    assert clock.remaining_s(0.17, 50_000, 0) == 500
    time.now += 488
    assert clock.share(300_000) == 1.0
    assert clock.remaining_s(1.0, 300_000, 0) == pytest.approx(12)


def test_before_its_first_validation_a_run_by_the_clock_assumes_a_forward_pass(time: Time) -> None:
    clock = clock_of(minutes=1.0, method="clean")
    clock.start(0.0, 0.0, 0)
    time.now += 30
    assert clock.share(1500) == pytest.approx(30 / (60 - SELECTION * PER_IMAGE_S * 0.4))


def test_a_slow_end_takes_at_most_half_of_a_run_by_the_clock(time: Time) -> None:
    clock = clock_of(minutes=1.0, method="clean")
    clock.start(0.0, 0.0, 0)
    clock.add_validation(500.0)
    time.now += 15
    assert clock.share(1000) == 0.5
