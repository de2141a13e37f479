"""Budgets in time: measured at the first start, read by later ones, or given as a profile."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mexit import Runtime
from mexit.core.atomic_io import to_json
from mexit.core.versions import installed_versions
from mexit.errors import Damaged, UsageError
from mexit.runtime.autotune import PACKAGES
from mexit.runtime.latency_profile import Profile, measure_times_us


def store_profile(bundle: Path, folder: Path, *exits_us: float, static_us: float, **changes: object) -> Path:
    """A file with a profile of the bundle in ONNX Runtime, as if it had been measured."""
    model = Runtime.open(bundle, "full").bundle.id
    profile = Profile(exits_us, static_us, model, "ort", "fp32", 1, installed_versions(PACKAGES))
    path = folder / "profile.json"
    path.write_bytes(to_json(asdict(profile) | changes))
    return path


def test_each_call_is_timed_in_every_round_in_turn() -> None:
    counts = [0, 0, 0]

    def count(k: int) -> None:
        counts[k] += 1

    exits_us, static_us = measure_times_us([lambda k=k: count(k) for k in range(3)])
    assert counts[0] == counts[1] == counts[2] >= 50
    assert min(*exits_us, static_us) > 0
    assert len(exits_us) == 2


def test_times_that_differ_by_less_than_a_percent_are_equal_costs() -> None:
    def costs(*exits_us: float, static_us: float = 1000.0) -> tuple[float, ...]:
        return Profile(exits_us, static_us, "m", "ort", "fp32", 1, {}).costs.cumulative

    assert costs(301.0, 652.0, 1103.0) == costs(304.0, 648.0, 1097.0) == (300, 650, 1100)
    assert costs(500.0, 490.0) == (500, 500), "costs do not decrease"


def test_a_given_profile_selects_thresholds_in_time(mixed_bundle, tmp_path) -> None:
    path = store_profile(mixed_bundle, tmp_path, 300, 900, 1200, static_us=1000)
    runtime, macs = (
        Runtime.open(mixed_bundle, "medium", **options) for options in ({"cost": "time", "profile": path}, {})
    )
    assert runtime.timing is not None
    entry = runtime.timing.entry
    assert runtime.policy() == entry.policy(entry.frontier[entry.named["medium"]])
    assert entry.frontier[entry.named["medium"]].budget_us == 650
    assert runtime.policy("0.65ms") == runtime.policy()
    assert macs.timing is None
    assert macs.policy() != runtime.policy()
    assert runtime.timing.summary().startswith(f"times of {path}: static 1,000 us; low ")
    again = Runtime.open(mixed_bundle, "medium", cost="time", profile=path)
    assert again.policy() == runtime.policy()
    assert not list(Path(os.environ["MEXIT_CACHE"]).rglob("policies-*")), "a given profile is not stored"


def test_all_budgets_are_the_static_network_where_nothing_is_saved(mixed_bundle, tmp_path) -> None:
    path = store_profile(mixed_bundle, tmp_path, 1000, 1100, 1200, static_us=1000)
    runtime = Runtime.open(mixed_bundle, "low", cost="time", profile=path)
    assert all(set(runtime.policy(name).thresholds) == {None} for name in ("low", "medium", "high", "full"))
    assert runtime.timing.summary().endswith("early exit saves no time here, and all budgets are the static network")


def test_the_first_start_measures_and_later_ones_read(mixed_bundle) -> None:
    first = Runtime.open(mixed_bundle, "low", cost="time")
    second = Runtime.open(mixed_bundle, "low", cost="time")
    assert (first.timing.measured, second.timing.measured) == (True, False)
    assert replace(second.timing, measured=True) == first.timing
    (path,) = Path(os.environ["MEXIT_CACHE"]).rglob("policies-ort-*.json")
    stored = json.loads(path.read_text())
    stored["profile"]["versions"]["onnxruntime"] = "0.1"
    path.write_text(json.dumps(stored))
    assert Runtime.open(mixed_bundle, "low", cost="time").timing.measured, "times of another version do not count"
    given = Runtime.open(mixed_bundle, "low", cost="time", profile=path)
    assert given.timing.profile.static_us > 0, "a file of the device cache can be given"


def test_changed_policies_in_the_device_cache_are_not_used(mixed_bundle) -> None:
    first = Runtime.open(mixed_bundle, "low", cost="time").timing
    assert first.stored
    assert first.summary().startswith("measured on this device: ")
    (path,) = Path(os.environ["MEXIT_CACHE"]).rglob("policies-ort-*.json")
    stored = json.loads(path.read_text())
    stored["entry"]["temperatures"][0] *= 2
    path.write_text(json.dumps(stored))
    again = Runtime.open(mixed_bundle, "low", cost="time").timing
    assert again.measured
    assert again.entry.temperatures == first.entry.temperatures
    assert not Runtime.open(mixed_bundle, "low", cost="time").timing.measured


@pytest.mark.parametrize("blocked", ["policies-ort-fp32-fp32-1.json", ".lock"])
def test_a_cache_that_cannot_be_written_is_named_at_each_start(mixed_bundle, blocked) -> None:
    Runtime.open(mixed_bundle, "low", cost="time")
    (path,) = Path(os.environ["MEXIT_CACHE"]).rglob("policies-ort-*.json")
    path.unlink()
    (path.parent / blocked).mkdir()
    for _ in range(2):
        timing = Runtime.open(mixed_bundle, "low", cost="time").timing
        assert timing.measured
        if blocked != ".lock":  # without a lock the file is written
            assert timing.summary().endswith(
                "every start measures again: set MEXIT_CACHE to a folder that can be written"
            )
            continue
        path.unlink()


@pytest.mark.parametrize("missing", ["cache", "traces"])
def test_without_a_cache_or_traces_a_bundle_opens(mixed_bundle, tmp_path, monkeypatch, missing) -> None:
    bundle = mixed_bundle
    if missing == "cache":
        (tmp_path / "file").touch()
        monkeypatch.setenv("MEXIT_CACHE", str(tmp_path / "file" / "cache"))
    else:
        bundle = tmp_path / "moved"
        bundle.mkdir()
        for path in mixed_bundle.rglob("*"):
            if path.is_file() and path.suffix != ".npz":
                target = bundle / path.relative_to(mixed_bundle)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        (bundle / "splits.npz").write_bytes((mixed_bundle / "splits.npz").read_bytes())
        for path in mixed_bundle.glob("calibration*.npz"):
            (bundle / path.name).write_bytes(path.read_bytes())
    runtime = Runtime.open(bundle, "low", cost="time")
    assert (runtime.timing is None) == (missing == "traces")
    assert ("budgets are in MACs: " in runtime.why_not_time) == (missing == "traces")
    assert runtime.policy("low").thresholds


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model": "other"}, "the model is other"), ({"threads": 9}, "the number of threads is 9"),
     ({"versions": {}}, "other versions of")],
)  # fmt: skip
def test_a_profile_of_something_else_is_refused(mixed_bundle, tmp_path, changes, message) -> None:
    path = store_profile(mixed_bundle, tmp_path, 300, 900, 1200, static_us=1000, **changes)
    with pytest.raises(UsageError, match=message):
        Runtime.open(mixed_bundle, "low", cost="time", profile=path)


@pytest.mark.parametrize(
    ("content", "message"), [("[", "is not valid JSON"), ('{"exits_us": [1]}', "its content: missing static_us")]
)
def test_a_damaged_profile_names_its_file(mixed_bundle, tmp_path, content, message) -> None:
    path = tmp_path / "times.json"
    path.write_text(content)
    with pytest.raises(Damaged, match=rf"times\.json .*{message}"):
        Runtime.open(mixed_bundle, "low", cost="time", profile=path)
    path = store_profile(mixed_bundle, tmp_path, 300, 900, 1200, static_us=1000)
    path.write_text(path.read_text().replace("900", "-900"))
    with pytest.raises(Damaged, match=rf"{path} cannot be used: times must be positive numbers"):
        Runtime.open(mixed_bundle, "low", cost="time", profile=path)


def test_costs_and_profiles_that_do_not_fit_are_refused(mixed_bundle) -> None:
    with pytest.raises(UsageError, match="choose from macs, time"):
        Runtime.open(mixed_bundle, cost="euros")
    with pytest.raises(UsageError, match="give --cost time"):
        Runtime.open(mixed_bundle, profile="times.json")
