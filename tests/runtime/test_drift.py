"""Drift detection: the test keeps its level for ever and finds shifts quickly; the watch on a real bundle."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

from mexit import Bundle, NotCalibrated, Prediction, Runtime, UsageError
from mexit.data import digits, splits
from mexit.models import model_spec
from mexit.runtime.drift import BET_FRACTIONS, BET_INTERVAL, DriftTest, DriftWatch


def first_alarms(outcomes: np.ndarray, p0: float, alpha: float) -> np.ndarray:
    """The time of the alarm in each stream (streams, time), `time` without one; a second, vectorised implementation."""
    streams, time = outcomes.shape
    fractions = np.array(BET_FRACTIONS)
    wealth, alarms = np.zeros((streams, len(BET_FRACTIONS))), np.full(streams, time)
    for now in range(time):
        if now % BET_INTERVAL == 0:
            start = now // BET_INTERVAL + 1
            wealth += 1 / (start * (start + 1) * len(BET_FRACTIONS))
        wealth *= np.where(outcomes[:, now, None], 1 + fractions / p0 * (1 - p0), 1 - fractions)
        raised = (wealth.sum(axis=1) >= 1 / alpha) & (alarms == time)
        alarms[raised] = now
        wealth[alarms < time] = 0  # the alarm stays raised; the wealth would overflow
    return alarms


def test_at_most_alpha_false_alarms_in_1000_streams_of_10000() -> None:
    rng = np.random.default_rng(0)
    alpha = 0.05
    false_alarms = (first_alarms(rng.random((1000, 10_000)) < 0.02, 0.02, alpha) < 10_000).sum()
    assert 0 < false_alarms <= alpha * 1000


@pytest.mark.parametrize(("rate", "median_delay"), [(0.06, 500), (0.15, 100), (0.5, 20)])
def test_a_shift_from_2_percent_is_found_quickly(rate, median_delay) -> None:
    delays = first_alarms(np.random.default_rng(1).random((200, 4000)) < rate, 0.02, 0.01)
    assert delays.max() < 4000
    assert np.median(delays) <= median_delay


@pytest.mark.parametrize("rate", [0.02, 0.2])
def test_one_stream_at_a_time_equals_the_vectorised_implementation(rate) -> None:
    outcomes = np.random.default_rng(2).random((20, 1500)) < rate
    for row, alarm in zip(outcomes, first_alarms(outcomes, 0.02, 0.01), strict=True):
        test = DriftTest(0.02, alpha=0.01)
        raised = [test.observe(bool(outcome)) for outcome in row]
        assert raised.index(True) == alarm if any(raised) else alarm == 1500


def test_a_shift_after_a_long_time_without_disagreement_is_found() -> None:
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
def test_invalid_levels_are_refused(p0, alpha) -> None:
    with pytest.raises(UsageError):
        DriftTest(p0, alpha)


def inverted(count: int, seed: int) -> np.ndarray:
    """Digits with inverted grey values, on which early and late exits often disagree."""
    data = digits.load()
    index = np.random.default_rng(seed).choice(splits.split(data).part("test"), count)
    return 1 - data.batch(index, model_spec("digits-cnn").input)


def noise(count: int, seed: int = 0) -> np.ndarray:
    """Noise images, on which few exits are confident."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.normal(0.5, 0.6, (count, 1, 8, 8)), 0, 1).astype(np.float32)


def answer_and_check(runtime: Runtime, images: Any) -> list[Prediction]:
    """Answer images, and wait for the checks of the drift watch."""
    predictions = runtime(images)
    assert runtime.drift_watch is not None
    runtime.drift_watch.join()
    assert runtime.drift_watch.dropped == 0
    return predictions


def test_answers_are_returned_before_they_are_checked(mixed_bundle, test_digits) -> None:
    """The static network, which early answers do not need, blocks until the answers are there."""
    runtime = Runtime.open(mixed_bundle, "40%", backend="ort")
    images = [image for image in test_digits[0] if runtime(image)[0].exit == 1][:5]
    runtime.watch_drift(1.0)
    static, answered = runtime.backend.static, threading.Event()
    run = static.run
    static.run = lambda carried: (answered.wait(60), run(carried))[1]
    predictions = runtime(images)
    assert [one.reason for one in predictions] == ["confident"] * 5
    assert runtime.stats.snapshot().watch_macs == 0
    answered.set()
    assert runtime.drift_watch is not None
    runtime.drift_watch.join()
    assert runtime.stats.snapshot().watch_macs == 5 * runtime.costs.static


def test_checks_are_dropped_and_counted_if_too_many_wait(mixed_bundle, caplog) -> None:
    watch = DriftWatch(Bundle.open(mixed_bundle).policies().entries[0], 1.0, max_pending=2)
    release, done = threading.Event(), list[int]()
    watch.submit(lambda: release.wait(60) and None)
    for number in range(4):
        watch.submit(lambda number=number: done.append(number))
    assert watch.dropped == 3
    release.set()
    watch.join()
    assert done == [0]
    watch.submit(lambda: 1 // 0)
    watch.join()
    assert "a drift check failed" in caplog.text
    watch.close()
    watch.submit(lambda: done.append(9))
    assert done == [0]


def test_no_alarm_on_data_like_the_calibration_data(digits_bundle, test_digits) -> None:
    runtime = Runtime.open(digits_bundle, "low")
    runtime.watch_drift(1.0, seed=0)
    for _ in range(3):
        answer_and_check(runtime, list(test_digits[0]))
    assert runtime.drift_watch is not None
    assert runtime.drift_watch.alarms == ()


def test_changed_data_raises_the_alarm_once_and_moves_to_a_safer_policy(mixed_bundle, caplog) -> None:
    runtime = Runtime.open(mixed_bundle, "40%")
    runtime.watch_drift(1.0, "safer", seed=0)
    before = runtime.policy()
    with caplog.at_level(logging.WARNING, "mexit.drift"):
        for seed in range(40):
            answer_and_check(runtime, inverted(64, seed))
    assert len([record for record in caplog.records if "the data has changed" in record.message]) == 1
    assert runtime.policy() != before
    assert {one.exit for one in runtime.answer_tensor(noise(64, 99))} == {3}


def test_an_alarm_alone_changes_no_answer(mixed_bundle) -> None:
    runtime = Runtime.open(mixed_bundle, "40%", watch_drift=1.0)
    before = runtime.policy()
    for seed in range(40):
        answer_and_check(runtime, inverted(64, seed))
    assert runtime.drift_watch is not None
    assert runtime.drift_watch.alarms
    assert runtime.policy() == before


def test_the_macs_of_the_watch_are_in_the_statistics(digits_bundle, test_digits) -> None:
    runtime = Runtime.open(digits_bundle, "low")
    runtime.watch_drift(1.0)
    answers = answer_and_check(runtime, list(test_digits[0]))
    early = sum(one.reason == "confident" for one in answers)
    snapshot = runtime.stats.snapshot()
    assert snapshot.watch_macs == early * runtime.costs.static
    assert snapshot.macs == sum(one.macs for one in answers)


def test_the_given_share_of_early_answers_is_watched(digits_bundle, test_digits) -> None:
    runtime = Runtime.open(digits_bundle, "low")
    runtime.watch_drift(0.1, seed=1)
    early = sum(one.reason == "confident" for _ in range(5) for one in answer_and_check(runtime, list(test_digits[0])))
    watched = runtime.stats.snapshot().watch_macs / runtime.costs.static
    assert abs(watched - 0.1 * early) < 5 * np.sqrt(0.09 * early)


def test_a_refused_watch_leaves_the_present_one_at_work(mixed_bundle, test_digits) -> None:
    runtime = Runtime.open(mixed_bundle, "40%", backend="ort", watch_drift=1.0)
    with pytest.raises(UsageError):
        runtime.watch_drift(2.0)
    runtime(list(test_digits[0][:20]))
    assert runtime.drift_watch is not None
    runtime.drift_watch.join()
    assert runtime.stats.snapshot().watch_macs > 0


FORKED_CHECK = """
import os, sys
from mexit import Bundle
from mexit.runtime.drift import DriftWatch
watch = DriftWatch(Bundle.open(sys.argv[1]).policies().entries[0], 1.0, max_pending=1)
watch.submit(lambda: None)
watch.join()
if (child := os.fork()) == 0:
    watch.submit(lambda: print("checked", flush=True))
    watch.join()
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_checks_in_a_thread_of_its_own(mixed_bundle) -> None:
    command = [sys.executable, "-c", FORKED_CHECK, str(mixed_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "checked\n"


def test_invalid_options_are_refused(digits_bundle, bundle_copy) -> None:
    with pytest.raises(UsageError, match=r"\(0, 1\]"):
        Runtime.open(digits_bundle, watch_drift=2.0)
    with pytest.raises(UsageError, match="alarm, safer"):
        Runtime.open(digits_bundle, watch_drift=0.1, on_drift="panic")
    (bundle_copy / "policies.json").unlink()
    with pytest.raises(NotCalibrated):
        Runtime.open(bundle_copy, "full", watch_drift=0.1)
