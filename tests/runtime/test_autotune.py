"""Autotune: the choice of `auto` is measured on this device, explained, and always calibrated."""

from __future__ import annotations

import dataclasses
import json
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from command_line import refused, typed

from mexit import BackendError, Runtime, UsageError
from mexit.core.bundle import Bundle
from mexit.runtime import autotune
from mexit.runtime.autotune import Choice, Timing, Tuning, tune
from mexit.runtime.backends import ort
from mexit.runtime.backends.registry import ENGINES, Engine
from mexit.runtime.device_cache import cache_folder

PARITY = Engine("other", "fp32", "fp32", "ort:OrtBackend")
ROUNDED = Engine("other", "bf16", "fp32", "ort:reduced")


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry holds onnxruntime, another engine of the same precision, and one of another precision."""
    for name in set(ENGINES) - {"ort"}:
        monkeypatch.delitem(ENGINES, name)
    monkeypatch.setattr(ort, "reduced", lambda bundle, threads, _: ort.OrtBackend(bundle, threads), raising=False)
    monkeypatch.setitem(ENGINES, "other", PARITY)
    monkeypatch.setitem(ENGINES, "other:bf16", ROUNDED)


@pytest.fixture
def bundle(bundle_copy: Path) -> Bundle:
    """A bundle that is calibrated for `ort` and `other` in float32."""
    bundle = Bundle.open(bundle_copy)
    policies = bundle.policies()
    bundle.save_policies(policies.with_entry(dataclasses.replace(policies.entries[0], engine="other")))
    return bundle


def store(bundle: Bundle, *timings: tuple[str, int, float], skipped: dict[str, str] | None = None) -> None:
    """Store (engine, threads, microseconds) as if they had been measured."""
    rows = tuple(Timing(name, threads, (us / 3,) * 3) for name, threads, us in timings)
    autotune.save(bundle, Tuning(autotune.versions(), rows, skipped or {}))


def chosen(bundle: Bundle, *given: object) -> tuple[str, int]:
    choice = autotune.choose(bundle, *given)
    return choice.backend, choice.threads


def test_every_engine_is_timed_with_every_number_of_threads_and_the_times_are_stored(bundle: Bundle) -> None:
    tune(bundle, 0.1, max_threads=2)
    tuning, _ = autotune.load(bundle)
    assert tuning is not None
    assert [(one.backend, one.threads) for one in tuning.timings] == [
        (name, threads) for name in ("ort", "other", "other:bf16") for threads in (1, 2)
    ]
    assert all(len(one.segments_us) == 3 and min(one.segments_us) > 1 for one in tuning.timings)
    assert all(one.static_us is not None and one.static_us > 1 for one in tuning.timings)
    folder = cache_folder(bundle.id)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in folder.iterdir()] == ["autotune.json"]


@pytest.mark.parametrize(("most", "expected"), [(1, [1]), (3, [1, 2, 3]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_numbers_of_threads_double_up_to_the_limit(bundle, most, expected) -> None:
    tuning = autotune.measure(bundle, 0, max_threads=most)
    assert [one.threads for one in tuning.timings if one.backend == "ort"] == expected


def test_engines_that_are_built_first_have_one_setting_and_are_left_out_on_request(bundle, monkeypatch) -> None:
    monkeypatch.setitem(ENGINES, "gpu", Engine("gpu", "fp32", "fp32", "ort:reduced", builds=True))
    timings = tune(bundle, 0, max_threads=2).rows
    assert [row.timing.threads for row in timings if row.timing.backend == "gpu"] == [1]
    without = tune(bundle, 0, builds=False)
    assert "mexit bench --tune" in without.skipped["gpu"]
    assert "gpu" not in {row.timing.backend for row in without.rows}


def test_each_round_starts_with_another_engine() -> None:
    """Otherwise the first engine would always find the caches that the last one left."""
    order: list[int] = []
    results = autotune.call_in_turn([lambda number=number: order.append(number) for number in range(3)], 0)
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2, 1, 2, 0]
    assert [len(one) for one in results] == [5, 5, 5]


def test_without_a_measurement_auto_is_one_thread_of_onnxruntime(bundle: Bundle) -> None:
    choice = autotune.choose(bundle)
    assert choice == Choice("ort", 1, False, "not measured on this device")
    assert not cache_folder(bundle.id).exists(), "opening a bundle never measures"


def test_the_fastest_engine_of_the_calibrated_precision_is_opened(bundle: Bundle) -> None:
    store(bundle, ("ort", 1, 300), ("ort", 2, 200), ("other", 1, 100), ("other:bf16", 1, 10))
    assert chosen(bundle) == ("other", 1)
    runtime = Runtime.open(bundle.path, "low")
    assert (runtime.backend.engine, runtime.threads) == ("ort", 1), "both names open the same class"


def test_engines_are_ranked_by_the_budgets_and_none_counts_as_slower_than_its_static_network(bundle: Bundle) -> None:
    """The first engine is slow where all segments run, which only its static network has to answer for."""
    chain = Timing("ort", 1, (100.0, 100.0, 900.0), 200.0)
    static = Timing("other", 1, (100.0, 100.0, 100.0), 280.0)
    autotune.save(bundle, Tuning(autotune.versions(), (chain, static), {}))
    rows = autotune.explain(bundle).rows
    assert chain.mean_us(None) == 200
    assert all(row.mean_us <= row.timing.static_us for row in rows)
    assert rows[0].mean_us < rows[1].mean_us
    assert chosen(bundle) == ("ort", 1)


def test_the_time_of_a_budget_is_that_of_the_exits_it_takes(bundle: Bundle) -> None:
    entry, timing = bundle.policies().entries[0], Timing("ort", 1, (10.0, 20.0, 40.0), 60.0)
    expected = []
    for name in ("low", "medium", "high", "full"):
        point = entry.frontier[entry.named[name]]
        last = 70 if any(value is not None for value in point.thresholds) else 60
        mean_us = np.dot(point.calibration.exits, (10, 30, last)) / point.calibration.n
        expected.append(min(60, mean_us))
    assert timing.mean_us(entry) == pytest.approx(np.mean(expected))
    assert timing.mean_us(entry) < 60


def test_the_chosen_threads_reach_engine_and_runtime(bundle: Bundle, monkeypatch) -> None:
    opened = []
    monkeypatch.setattr(ort, "OrtBackend", lambda *given: opened.append(given) or _opened(*given))
    store(bundle, ("ort", 1, 300), ("ort", 2, 200))
    assert Runtime.open(bundle.path).threads == 2
    assert Runtime.open(bundle.path, threads=3).threads == 3
    assert Runtime.open(bundle.path, backend="ort").threads == 2
    assert [given[1] for given in opened] == [2, 3, 2]


def _opened(bundle: Bundle, threads: int, precision: str, kind: type = ort.OrtBackend) -> object:
    return kind(bundle, threads, precision)


def test_the_engine_and_threads_that_the_user_names_are_taken(bundle: Bundle) -> None:
    store(bundle, ("ort", 1, 300), ("ort", 2, 200), ("other", 1, 100), ("other", 2, 240), ("other:bf16", 1, 10))
    assert chosen(bundle, "ort") == ("ort", 2)
    assert chosen(bundle, "auto", 2) == ("ort", 2), "the fastest with two threads is another engine"
    assert chosen(bundle, "auto", 5) == ("other", 5)
    assert chosen(bundle, "other:bf16", 7) == ("other:bf16", 7)
    assert chosen(bundle, "other:bf16") == ("other:bf16", 1)
    with pytest.raises(UsageError, match="unknown backend 'tpu'"):
        autotune.choose(bundle, "tpu")


def test_a_little_faster_is_not_worth_a_thread_or_another_engine(bundle: Bundle) -> None:
    store(bundle, ("ort", 1, 108), ("ort", 2, 101), ("other", 1, 100))
    assert chosen(bundle) == ("ort", 1)
    store(bundle, ("ort", 1, 112), ("ort", 2, 100), ("other", 2, 99))
    assert chosen(bundle) == ("ort", 2)


def test_a_faster_engine_is_taken_once_it_is_calibrated_without_measuring_again(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    store(bundle, ("ort", 1, 300), ("other:bf16", 1, 100), ("other:bf16", 2, 400))
    first = autotune.explain(bundle)
    assert first.choice.backend == "ort"
    command = f"mexit calibrate {bundle_copy} --backend other:bf16"
    assert [(row.state, row.command) for row in first.rows] == [
        ("chosen", None), ("not calibrated", command), ("not calibrated", None),
    ]  # fmt: skip
    policies = bundle.policies()
    entry = dataclasses.replace(policies.entries[0], engine="other", precision="bf16")
    bundle.save_policies(policies.with_entry(entry))
    assert [row.state for row in autotune.explain(bundle).rows] == ["usable", "chosen", "usable"]
    assert chosen(bundle) == ("other:bf16", 1)


def test_a_faster_engine_without_the_reject_option_of_others_is_not_taken(reject_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(Path(shutil.copytree(reject_bundle, tmp_path / "reject")))
    policies = bundle.policies()
    points = tuple(dataclasses.replace(point, reject=None) for point in policies.entries[0].frontier)
    plain = dataclasses.replace(policies.entries[0], engine="other", frontier=points, reject=None)
    bundle.save_policies(policies.with_entry(plain))
    store(bundle, ("ort", 1, 300), ("other", 1, 100))
    assert chosen(bundle) == ("ort", 1)
    bundle.save_policies(policies.with_entry(dataclasses.replace(policies.entries[0], engine="other")))
    assert chosen(bundle) == ("other", 1)


def test_without_usable_policies_only_the_reference_precision_is_taken(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    store(bundle, ("ort", 1, 300), ("other", 1, 200), ("other:bf16", 1, 100))
    for content in (None, "{"):
        (bundle_copy / "policies.json").unlink(missing_ok=True)
        if content:
            (bundle_copy / "policies.json").write_text(content)
        assert chosen(bundle) == ("other", 1)


@pytest.mark.parametrize("damage", ["{", "[]", '{"versions": {}, "timings": 3, "skipped": {}}', "exits", "nan", "name"])
def test_a_damaged_measurement_is_not_relied_on_and_is_replaced(bundle: Bundle, damage: str) -> None:
    timing = {"exits": ("ort", 2, (1.0,)), "nan": ("ort", 2, (-1.0,) * 3), "name": ("tpu", 2, (1.0,) * 3)}
    path = autotune.save(bundle, Tuning(autotune.versions(), (Timing(*timing.get(damage, ("ort", 2, ()))),), {}))
    if damage not in timing:
        path.write_text(damage)
    assert autotune.choose(bundle) == Choice("ort", 1, False, "the measurement of this device cannot be read")
    tune(bundle, 0)
    assert autotune.choose(bundle).measured


def test_a_measurement_of_other_packages_is_stale(bundle: Bundle) -> None:
    rows = (Timing("ort", 2, (1.0, 1.0, 1.0)),)
    before = {**autotune.versions(), "onnxruntime": "1.2.3", "openvino": "1900.1"}
    autotune.save(bundle, Tuning(before, rows, {}))
    assert autotune.choose(bundle) == Choice("ort", 1, False, "measured before onnxruntime, openvino changed")
    typed("bench", bundle.path, "--tune", "--repeats", "20", "--batch", "1")
    assert autotune.choose(bundle).measured


def test_the_reason_is_given_for_an_engine_that_cannot_be_timed(bundle: Bundle, monkeypatch) -> None:
    def refuses(*_: object) -> None:
        raise BackendError("the driver is too old")

    monkeypatch.setattr(ort, "refuses", refuses, raising=False)
    monkeypatch.setitem(ENGINES, "gpu", Engine("gpu", "fp32", "fp32", "ort:refuses"))
    monkeypatch.setitem(ENGINES, "ort:int8", Engine("ort", "int8", "int8", "ort:OrtBackend"))
    skipped = tune(bundle, 0).skipped
    assert skipped["gpu"] == "the driver is too old"
    assert "export the run again with --precision int8" in skipped["ort:int8"]
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    nothing = tune(bundle, 0)
    assert "pip install 'mexit[cpu]'" in nothing.skipped["ort"]
    assert (nothing.rows, nothing.choice.backend) == ((), "ort")


def test_a_measured_engine_that_no_longer_opens_names_two_ways_out(bundle: Bundle, monkeypatch) -> None:
    def refuses(*_: object) -> None:
        raise BackendError("no device")

    monkeypatch.setattr(ort, "refuses", refuses, raising=False)
    monkeypatch.setitem(ENGINES, "other", dataclasses.replace(PARITY, opener="ort:refuses"))
    store(bundle, ("ort", 1, 300), ("other", 1, 100))
    with pytest.raises(BackendError, match=rf"^no device .*bench {bundle.path} --tune .*--backend ort"):
        Runtime.open(bundle.path)
    with pytest.raises(BackendError, match=r"^no device$"):
        Runtime.open(bundle.path, backend="other")
    assert Runtime.open(bundle.path, backend="ort")


def test_a_cache_that_cannot_be_written_stops_only_the_measurement(bundle, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEXIT_CACHE", str(tmp_path / "file" / "cache"))
    assert Runtime.open(bundle.path, "1000ms").threads == 1
    assert "set MEXIT_CACHE to a folder that can be written" in refused("bench", bundle.path, "--tune", code=1)


def test_export_times_the_device_at_its_end(workspace: Path, bundle: Bundle, session_cache, monkeypatch) -> None:
    monkeypatch.setenv("MEXIT_CACHE", str(session_cache))
    assert (cache_folder(bundle.id) / "autotune.json").exists()


def test_inspect_and_bench_explain_the_choice(bundle: Bundle) -> None:
    text = typed("inspect", bundle.path).stdout
    assert "auto on this device: ort, 1 thread(s), not measured on this device; mexit bench --tune" in text
    assert json.loads(typed("inspect", bundle.path, "--json").stdout)["tuning"]["rows"] == []
    store(bundle, ("ort", 1, 300), ("other:bf16", 1, 90), skipped={"trt": "no driver"})
    text = " ".join(typed("inspect", bundle.path).stdout.split())
    assert "the fastest measured here" in text
    assert " 90 " in text
    assert "no driver" not in text, "nothing but the engines that serve or would be faster"
    assert "times of exits and of budgets are end to end and measured apart" in text
    assert f"faster once calibrated: mexit calibrate {bundle.path} --backend other:bf16" in text
    explained = json.loads(typed("inspect", bundle.path, "--json").stdout)["tuning"]
    assert explained["chosen"]["backend"] == "ort"
    assert explained["rows"][1]["segments_us"] == [30, 30, 30]
    done = typed("bench", bundle.path, "--tune", "--repeats", "20", "--batch", "1", "--json")
    explained = json.loads(done.stdout)
    assert {row["backend"] for row in explained["tuning"]["rows"]} == {"ort", "other", "other:bf16"}
    assert explained["rows"][0]["threads"] == explained["tuning"]["chosen"]["threads"]
