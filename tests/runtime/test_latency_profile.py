"""The latency profile of a device, and the budgets in milliseconds that rest on it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mexit import BudgetInfeasible, Runtime
from mexit.core.budget import Budget
from mexit.runtime.device_cache import cache_folder
from mexit.runtime.latency_profile import expected_ms, index_within, time_exits


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("MEXIT_CACHE", str(tmp_path / "cache"))


def store_times(runtime: Runtime, *mean_ms: float) -> Path:
    """A latency profile as if it had been measured."""
    folder = cache_folder(runtime.bundle.id)
    folder.mkdir(parents=True)
    path = folder / "times-ort-fp32-1.json"
    path.write_text(json.dumps({"mean_ms": mean_ms, "rounds": 200}))
    return path


def test_exits_are_timed_in_turn_and_the_profile_increases() -> None:
    order: list[int] = []
    times_ms = time_exits(order.append, 3)
    assert order[:6] == [1, 2, 3, 1, 2, 3]
    assert len(order) % 3 == 0
    assert 0 < times_ms[0] <= times_ms[1] <= times_ms[2]


def test_a_budget_in_milliseconds_takes_the_most_expensive_policy_within_it(mixed_bundle) -> None:
    runtime = Runtime.open(mixed_bundle, "full")
    entry = runtime.bundle.policies().entries[0]
    times_ms = (1.0, 2.0, 4.0)
    store_times(runtime, *times_ms)
    runtime.budget = "2.5ms"
    expected = [expected_ms(point, times_ms) for point in entry.frontier]
    within = [point for point, ms in zip(entry.frontier, expected, strict=True) if ms <= 2.5]
    assert 0 < len(within) < len(entry.frontier)
    assert runtime.policy() == entry.policy(within[-1])
    assert index_within(entry.frontier, 2.5, times_ms) == len(within) - 1


def test_a_measured_profile_is_stored_and_measured_again_if_it_is_damaged(digits_bundle) -> None:
    runtime = Runtime.open(digits_bundle, "full")
    runtime.policy("1000ms")
    (path,) = cache_folder(runtime.bundle.id).glob("times-ort-fp32-1.json")
    times_ms = json.loads(path.read_text())["mean_ms"]
    assert len(times_ms) == 3
    assert times_ms == sorted(times_ms)
    first = path.read_text()
    Runtime.open(digits_bundle, "1000ms")
    assert path.read_text() == first
    path.write_text("{")
    Runtime.open(digits_bundle, "1000ms")
    assert len(json.loads(path.read_text())["mean_ms"]) == 3
    assert not [name for name in os.listdir(digits_bundle) if "time" in name], "facts of a device stay out of bundles"


def test_an_infeasible_time_names_the_nearest_feasible_one(digits_bundle) -> None:
    runtime = Runtime.open(digits_bundle)
    store_times(runtime, 1.0, 2.0, 4.0)
    with pytest.raises(BudgetInfeasible, match="nearest feasible budget is") as caught:
        runtime.budget = "0.00001ms"
    nearest = str(caught.value).rsplit(" ", 1)[1]
    runtime.budget = nearest
    assert runtime.budget == Budget.parse(nearest)
