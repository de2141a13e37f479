"""The drift test keeps its level for ever, and is quick to see a shift."""

from __future__ import annotations

import numpy as np
import pytest

from mexit.errors import UsageError
from mexit.runtime.drift_test import GENERATION, STAKES, DriftTest


def first_alarms(outcomes: np.ndarray, p0: float, alpha: float) -> np.ndarray:
    """When each stream (streams, time) raises the alarm, `time` if never; a second, vectorised writing."""
    streams, time = outcomes.shape
    shares = np.array(STAKES)
    wealth, alarms = np.zeros((streams, len(STAKES))), np.full(streams, time)
    for now in range(time):
        if now % GENERATION == 0:
            place = now // GENERATION + 1
            wealth += 1 / (place * (place + 1) * len(STAKES))
        wealth *= np.where(outcomes[:, now, None], 1 + shares / p0 * (1 - p0), 1 - shares)
        raised = (wealth.sum(axis=1) >= 1 / alpha) & (alarms == time)
        alarms[raised] = now
        wealth[alarms < time] = 0  # once raised it stays; its wealth would only overflow
    return alarms


def test_at_most_alpha_false_alarms_in_1000_streams_of_10000() -> None:
    rng = np.random.default_rng(0)
    alpha = 0.05
    false_alarms = (first_alarms(rng.random((1000, 10_000)) < 0.02, 0.02, alpha) < 10_000).sum()
    assert 0 < false_alarms <= alpha * 1000


@pytest.mark.parametrize(("rate", "median_delay"), [(0.06, 500), (0.15, 100), (0.5, 20)])
def test_a_shift_from_2_percent_is_seen_quickly(rate, median_delay) -> None:
    delays = first_alarms(np.random.default_rng(1).random((200, 4000)) < rate, 0.02, 0.01)
    assert delays.max() < 4000
    assert np.median(delays) <= median_delay


@pytest.mark.parametrize("rate", [0.02, 0.2])
def test_one_stream_at_a_time_equals_the_vectorised_writing(rate) -> None:
    outcomes = np.random.default_rng(2).random((20, 1500)) < rate
    for row, alarm in zip(outcomes, first_alarms(outcomes, 0.02, 0.01), strict=True):
        test = DriftTest(0.02, alpha=0.01)
        raised = [test.observe(bool(outcome)) for outcome in row]
        assert raised.index(True) == alarm if any(raised) else alarm == 1500


def test_a_shift_after_a_long_calm_is_seen() -> None:
    rng = np.random.default_rng(4)
    outcomes = np.concatenate([np.zeros((100, 20_000), bool), rng.random((100, 2000)) < 0.15], axis=1)
    delays = first_alarms(outcomes, 0.02, 0.01) - 20_000
    assert delays.min() >= 0
    assert delays.max() < 2000
    assert np.median(delays) < 400


def test_a_rate_of_zero_can_still_be_tested() -> None:
    test = DriftTest(0.0)
    assert not any(test.observe(False) for _ in range(20))
    assert not test.observe(True)
    assert test.observe(True)


@pytest.mark.parametrize(("p0", "alpha"), [(-0.1, 0.01), (1.0, 0.01), (0.1, 0.0)])
def test_impossible_levels_are_refused(p0, alpha) -> None:
    with pytest.raises(UsageError):
        DriftTest(p0, alpha)
