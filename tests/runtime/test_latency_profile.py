"""The drift watch on a real bundle, and budgets in milliseconds."""

from __future__ import annotations

import json
import logging
import os
import stat
import time

import numpy as np
import pytest

from mexit import BudgetInfeasible, NotCalibrated, Runtime, UsageError
from mexit.core.budget import Budget
from mexit.data import digits, splits
from mexit.models import model_spec
from mexit.runtime.latency_profile import cache_folder, cache_root, expected_ms


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("MEXIT_CACHE", str(tmp_path / "cache"))


def inverted(count: int, seed: int) -> np.ndarray:
    """Digits in white on black's place, on which early and late exits often differ."""
    data = digits.load()
    index = np.random.default_rng(seed).choice(splits.split(data).part("test"), count)
    return 1 - data.batch(index, model_spec("digits-cnn").input)


def noise(count: int, seed: int = 0) -> np.ndarray:
    """Images unlike digits, on which few exits are sure."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.normal(0.5, 0.6, (count, 1, 8, 8)), 0, 1).astype(np.float32)


def test_the_watch_is_quiet_on_data_like_the_calibration_data(digits_bundle, test_digits) -> None:
    runtime = Runtime.open(digits_bundle, "low")
    runtime.watch_drift(1.0, seed=0)
    for _ in range(3):
        runtime(list(test_digits[0]))
    assert runtime.drift_watch is not None
    assert runtime.drift_watch.alarms == ()


def test_changed_data_raises_the_alarm_once_and_moves_to_a_safer_policy(mixed_bundle, caplog) -> None:
    runtime = Runtime.open(mixed_bundle, "40%")
    runtime.watch_drift(1.0, "safer", seed=0)
    before = runtime.policy()
    with caplog.at_level(logging.WARNING, "mexit.drift"):
        for seed in range(40):
            runtime.answer_tensor(inverted(64, seed))
    assert len([record for record in caplog.records if "the data has changed" in record.message]) == 1
    assert runtime.policy() != before
    assert {found.exit for found in runtime.answer_tensor(noise(64, 99))} == {3}


def test_an_alarm_alone_changes_no_answer(mixed_bundle) -> None:
    runtime = Runtime.open(mixed_bundle, "40%", watch_drift=1.0)
    before = runtime.policy()
    for seed in range(40):
        runtime.answer_tensor(inverted(64, seed))
    assert runtime.drift_watch is not None
    assert runtime.drift_watch.alarms
    assert runtime.policy() == before


def test_what_the_watch_costs_is_in_the_ledger(digits_bundle, test_digits) -> None:
    runtime = Runtime.open(digits_bundle, "low")
    runtime.watch_drift(1.0)
    answers = runtime(list(test_digits[0]))
    early = sum(found.reason == "confident" for found in answers)
    snapshot = runtime.stats.snapshot()
    assert snapshot.watch_macs == early * runtime.bundle.manifest.cumulative_macs[-1]
    assert snapshot.macs == sum(found.macs for found in answers)


def test_a_share_is_a_share(digits_bundle, test_digits) -> None:
    runtime = Runtime.open(digits_bundle, "low")
    runtime.watch_drift(0.1, seed=1)
    early = sum(found.reason == "confident" for _ in range(5) for found in runtime(list(test_digits[0])))
    watched = runtime.stats.snapshot().watch_macs / runtime.bundle.manifest.cumulative_macs[-1]
    assert abs(watched - 0.1 * early) < 5 * np.sqrt(0.09 * early)


def test_misuse_of_the_watch_is_refused(digits_bundle, bundle_copy) -> None:
    with pytest.raises(UsageError, match=r"\(0, 1\]"):
        Runtime.open(digits_bundle, watch_drift=2.0)
    with pytest.raises(UsageError, match="alarm, safer"):
        Runtime.open(digits_bundle, watch_drift=0.1, on_drift="panic")
    (bundle_copy / "policies.json").unlink()
    with pytest.raises(NotCalibrated):
        Runtime.open(bundle_copy, "full", watch_drift=0.1)


def test_a_budget_in_milliseconds_is_kept_on_calibration_data(mixed_bundle) -> None:

    runtime = Runtime.open(mixed_bundle, "full")
    data = digits.load()
    index = splits.split(data).part("calibration")
    images = data.batch(index, runtime.bundle.manifest.input)
    times = json.loads(_measured_times(runtime).read_text())["mean_ms"]
    assert times == sorted(times)
    limit = (times[0] + times[-1]) / 2
    runtime.budget = f"{limit:.4f}ms"
    entry = runtime.bundle.policies().entries[0]
    point = next(point for point in entry.frontier if entry.policy(point) == runtime.policy())
    assert 0.5 * limit < expected_ms(point, times) <= limit
    begin = time.perf_counter()
    for image in images:
        runtime.answer_tensor(image[None])
    assert time.perf_counter() - begin < 20 * limit * len(images) / 1e3, "the order of magnitude is right"


def test_times_are_kept_for_this_device_alone_and_measured_again_if_damaged(digits_bundle) -> None:
    runtime = Runtime.open(digits_bundle, "full")
    path = _measured_times(runtime)
    made = [folder for folder in path.parents if folder.is_relative_to(cache_root())]
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in made] == [0o700] * 3  # device, model, root
    first = path.read_text()
    Runtime.open(digits_bundle, "1000ms")
    assert path.read_text() == first
    path.write_text("{")
    Runtime.open(digits_bundle, "1000ms")
    assert len(json.loads(path.read_text())["mean_ms"]) == 3
    assert not [name for name in os.listdir(digits_bundle) if "time" in name]


def test_an_impossible_time_names_the_nearest(digits_bundle) -> None:
    runtime = Runtime.open(digits_bundle)
    with pytest.raises(BudgetInfeasible, match="nearest feasible budget is") as caught:
        runtime.budget = "0.00001ms"
    nearest = str(caught.value).rsplit(" ", 1)[1]
    runtime.budget = nearest
    assert runtime.budget == Budget.parse(nearest)


def _measured_times(runtime: Runtime):
    runtime.policy("1000ms")
    (path,) = cache_folder(runtime.bundle.id).glob("times-ort-fp32-1.json")
    return path
