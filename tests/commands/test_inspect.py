"""`mexit inspect` shows the times that this device has measured beside the MACs, and measures none."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
from command_line import typed

from mexit import Bundle
from mexit.core.versions import installed_versions
from mexit.runtime.autotune import PACKAGES
from mexit.runtime.device_cache import write_fact
from mexit.runtime.latency_profile import Profile
from mexit.runtime.profile_cache import profile_path

EXITS_US, STATIC_US = (300.0, 900.0, 1200.0), 1000.0


def inspected(bundle: Path) -> str:
    return " ".join(typed("inspect", bundle).stdout.split())


def test_without_times_it_says_which_commands_measure(digits_bundle) -> None:
    assert "no times: mexit calibrate or the first mexit serve on this device measures them" in inspected(digits_bundle)
    assert json.loads(typed("inspect", digits_bundle, "--json").stdout)["times"] == [None]
    assert not list(Path(os.environ["MEXIT_CACHE"]).rglob("*.json"))


@pytest.fixture
def profile(mixed_bundle) -> Profile:
    """A profile in the device cache, as if a budget in milliseconds had been used."""
    bundle = Bundle.open(mixed_bundle)
    profile = Profile(EXITS_US, STATIC_US, bundle.id, "ort", "fp32", 1, installed_versions(PACKAGES))
    write_fact(profile_path("profile", bundle, bundle.policies().entries[0], 1), asdict(profile))
    return profile


def test_times_stand_beside_the_macs_of_exits_and_budgets(mixed_bundle, profile) -> None:
    text = inspected(mixed_bundle)
    assert all(f" {time} " in text for time in ("300", "900", "1,200", "1,000"))
    assert "us: a single image on this device, end to end, in ort fp32 with 1 thread(s)" in text
    (entry,) = Bundle.open(mixed_bundle).policies().entries
    point = entry.frontier[entry.named["medium"]]
    mean_us = sum(n * us for n, us in zip(point.held_out.exits, EXITS_US, strict=True)) / point.held_out.n
    row = next(line for line in typed("inspect", mixed_bundle).stdout.splitlines() if line.startswith("medium "))
    assert row.split("│")[2].strip() == f"{mean_us:,.0f}"
    (times,) = json.loads(typed("inspect", mixed_bundle, "--json").stdout)["times"]
    assert (times["profile"]["exits_us"], times["timed"]) == (list(EXITS_US), None)


def test_the_policies_that_calibrate_selects_in_time_are_shown(bundle_copy) -> None:
    options = ("--attack", "none", "--cost", "time", "--json")
    calibrated = json.loads(typed("calibrate", bundle_copy, *options).stdout)
    (times,) = json.loads(typed("inspect", bundle_copy, "--json").stdout)["times"]
    assert times["timed"] == calibrated["timed"]
    assert "budgets in time on this device" in inspected(bundle_copy)
