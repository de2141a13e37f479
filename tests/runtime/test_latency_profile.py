"""Budgets in milliseconds where the policies are in MACs: they rest on the latency profile of the device."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from mexit import BudgetInfeasible, Runtime
from mexit.core.atomic_io import to_json
from mexit.core.budget import Budget
from mexit.core.versions import installed_versions
from mexit.runtime.autotune import PACKAGES
from mexit.runtime.latency_profile import Profile, expected_us, index_within
from mexit.runtime.profile_cache import profile_path


def store_profile(runtime: Runtime, *exits_us: float, static_us: float) -> Profile:
    """A latency profile in the device cache, as if it had been measured."""
    path = profile_path("profile", runtime.bundle, runtime.backend, runtime.threads)
    path.parent.mkdir(parents=True)
    profile = Profile(exits_us, static_us, runtime.bundle.id, "ort", "fp32", 1, installed_versions(PACKAGES))
    path.write_bytes(to_json(asdict(profile)))
    return profile


def test_a_budget_in_milliseconds_takes_the_most_expensive_policy_within_it(mixed_bundle) -> None:
    runtime = Runtime.open(mixed_bundle, "full")
    entry = runtime.bundle.policies().entries[0]
    times = store_profile(runtime, 1000, 2000, 4000, static_us=4000).costs
    runtime.budget = "2.5ms"
    expected = [expected_us(point, times) for point in entry.frontier]
    within = [point for point, us in zip(entry.frontier, expected, strict=True) if us <= 2500]
    assert 0 < len(within) < len(entry.frontier)
    assert runtime.policy() == entry.policy(within[-1])
    assert index_within(entry.frontier, 2.5, times) == len(within) - 1


def test_the_time_of_a_policy_without_thresholds_is_that_of_the_static_network(mixed_bundle) -> None:
    runtime = Runtime.open(mixed_bundle, "full")
    point = runtime.bundle.policies().entries[0].frontier[-1]
    assert set(point.thresholds) == {None}
    assert expected_us(point, store_profile(runtime, 1000, 2000, 4000, static_us=3000).costs) == 3000


def test_a_measured_profile_is_stored_and_measured_again_if_it_is_damaged(digits_bundle) -> None:
    runtime = Runtime.open(digits_bundle, "full")
    runtime.policy("1000ms")
    path = profile_path("profile", runtime.bundle, runtime.backend, runtime.threads)
    first = path.read_text()
    assert len(json.loads(first)["exits_us"]) == 3
    Runtime.open(digits_bundle, "1000ms")
    assert path.read_text() == first
    path.write_text("{")
    Runtime.open(digits_bundle, "1000ms")
    assert len(json.loads(path.read_text())["exits_us"]) == 3
    assert not [name for name in os.listdir(digits_bundle) if "profile" in name], (
        "facts of a device stay out of bundles"
    )


def test_the_times_of_policies_in_time_are_used_in_macs_too(mixed_bundle) -> None:
    Runtime.open(mixed_bundle, "low", cost="time")
    runtime = Runtime.open(mixed_bundle, "1000ms")
    assert not profile_path("profile", runtime.bundle, runtime.backend, runtime.threads).exists()
    assert not list(Path(os.environ["MEXIT_CACHE"]).rglob("profile-*"))


def test_an_infeasible_time_names_the_nearest_feasible_one(digits_bundle) -> None:
    runtime = Runtime.open(digits_bundle)
    store_profile(runtime, 1000, 2000, 4000, static_us=4000)
    with pytest.raises(BudgetInfeasible, match="nearest feasible budget is") as caught:
        runtime.budget = "0.00001ms"
    nearest = str(caught.value).rsplit(" ", 1)[1]
    runtime.budget = nearest
    assert runtime.budget == Budget.parse(nearest)
