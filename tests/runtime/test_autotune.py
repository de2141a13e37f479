"""Which engine `auto` is: measured on this device, kept with its reasons, never one that is not calibrated."""

from __future__ import annotations

import dataclasses
import json
import stat
from pathlib import Path

import numpy as np
import pytest
from command_line import refused, typed

from mexit import BackendError, MexitError, Runtime, UsageError
from mexit.core.bundle import Bundle
from mexit.flows.tune import tune
from mexit.runtime import autotune
from mexit.runtime.autotune import Choice, Timing, Tuning
from mexit.runtime.backends import ort
from mexit.runtime.backends.registry import ENGINES, Engine
from mexit.runtime.latency_profile import cache_folder
from mexit.runtime.resource_limits import ResourceLimits, read_limits

PARITY = Engine("other", "fp32", "fp32", "ort:OrtBackend")
ROUNDED = Engine("other", "bf16", "fp32", "ort:reduced")


@pytest.fixture(autouse=True)
def _catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime, another engine of the same precision, and one of another, on two processors."""
    for name in set(ENGINES) - {"ort"}:
        monkeypatch.delitem(ENGINES, name)
    monkeypatch.setattr(ort, "reduced", lambda bundle, threads, _: ort.OrtBackend(bundle, threads), raising=False)
    monkeypatch.setitem(ENGINES, "other", PARITY)
    monkeypatch.setitem(ENGINES, "other:bf16", ROUNDED)
    monkeypatch.setattr(autotune, "granted", lambda: ResourceLimits(2, None, None))


@pytest.fixture
def bundle(digits_bundle: Path) -> Bundle:
    return Bundle.open(digits_bundle)


def keep(bundle: Bundle, *timings: tuple[str, int, float], skipped: dict[str, str] | None = None) -> None:
    """Store (engine, threads, microseconds) as if measured."""
    rows = tuple(Timing(name, threads, (us / 3,) * 3) for name, threads, us in timings)
    autotune.save(bundle, Tuning(autotune.versions(), rows, skipped or {}))


def chosen(bundle: Bundle, *given: object) -> tuple[str, int]:
    choice = autotune.choose(bundle, *given)
    return choice.backend, choice.threads


def test_every_engine_is_timed_with_every_number_of_threads_and_the_result_is_kept(bundle: Bundle) -> None:
    tune(bundle.path, seconds=0.1)
    tuning = autotune.load(bundle).tuning
    assert tuning is not None
    assert [(one.backend, one.threads) for one in tuning.timings] == [
        (name, threads) for name in ("ort", "other", "other:bf16") for threads in (1, 2)
    ]
    assert all(len(one.segments_us) == 3 and min(one.segments_us) > 1 for one in tuning.timings)
    folder = cache_folder(bundle.id)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in folder.iterdir()] == ["autotune.json"]


@pytest.mark.parametrize(("most", "expected"), [(1, [1]), (3, [1, 2, 3]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_thread_settings_end_at_what_the_process_is_granted(bundle, monkeypatch, most, expected) -> None:
    monkeypatch.setattr(autotune, "granted", lambda: ResourceLimits(64, most - 0.5, None))
    tuning = autotune.measure(bundle, 0)
    assert [one.threads for one in tuning.timings if one.backend == "ort"] == expected


def test_engines_that_are_built_first_have_threads_of_their_own_and_export_does_without(
    bundle, monkeypatch
) -> None:
    monkeypatch.setitem(ENGINES, "gpu", Engine("gpu", "fp32", "fp32", "ort:reduced", builds=True))
    timings = tune(bundle.path, seconds=0).rows
    assert [row.timing.threads for row in timings if row.timing.backend == "gpu"] == [1]
    found = tune(bundle.path, seconds=0, builds=False)
    assert "mexit bench --tune" in found.skipped["gpu"]
    assert "gpu" not in {row.timing.backend for row in found.rows}


def test_turns_start_with_another_engine_each_round() -> None:
    """Else the first would always find the caches that the last one left."""
    order: list[int] = []

    class Recorder:
        segments = ()

        def __init__(self, number: int) -> None:
            self.number = number

        def carry(self, images: object) -> None:
            order.append(self.number)

    image = np.zeros((1, 1, 8, 8), np.float32)
    candidates = [autotune._Candidate(Timing("ort", 1, ()), Recorder(number), image) for number in range(3)]
    autotune._take_turns(candidates, image, 0)
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2, 1, 2, 0]


def test_without_a_measurement_auto_is_one_thread_of_onnxruntime(bundle: Bundle) -> None:
    choice = autotune.choose(bundle)
    assert choice == Choice("ort", 1, False, "not measured on this device")
    assert not cache_folder(bundle.id).exists(), "opening measures nothing"


def test_the_fastest_of_one_parity_class_is_opened(bundle: Bundle) -> None:
    keep(bundle, ("ort", 1, 300), ("ort", 2, 200), ("other", 1, 100), ("other:bf16", 1, 10))
    assert chosen(bundle) == ("other", 1)
    runtime = Runtime.open(bundle.path, "low")
    assert (runtime.backend.engine, runtime.threads) == ("ort", 1), "the class behind both names"


def test_the_chosen_threads_reach_engine_and_runtime(bundle: Bundle, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(ort, "OrtBackend", lambda *given: asked.append(given) or _opened(*given))
    keep(bundle, ("ort", 1, 300), ("ort", 2, 200))
    assert Runtime.open(bundle.path).threads == 2
    assert Runtime.open(bundle.path, threads=3).threads == 3
    assert Runtime.open(bundle.path, backend="ort").threads == 2
    assert [given[1] for given in asked] == [2, 3, 2]


def _opened(bundle: Bundle, threads: int, precision: str, kind: type = ort.OrtBackend) -> object:
    return kind(bundle, threads, precision)


def test_what_the_user_names_is_taken(bundle: Bundle) -> None:
    keep(bundle, ("ort", 1, 300), ("ort", 2, 200), ("other", 1, 100), ("other", 2, 240), ("other:bf16", 1, 10))
    assert chosen(bundle, "ort") == ("ort", 2)
    assert chosen(bundle, "auto", 2) == ("ort", 2), "the fastest with two threads is another engine"
    assert chosen(bundle, "auto", 5) == ("other", 5)
    assert chosen(bundle, "other:bf16", 7) == ("other:bf16", 7)
    assert chosen(bundle, "other:bf16") == ("other:bf16", 1)
    with pytest.raises(UsageError, match="unknown backend 'tpu'"):
        autotune.choose(bundle, "tpu")


def test_a_little_faster_is_not_worth_a_thread_or_another_engine(bundle: Bundle) -> None:
    keep(bundle, ("ort", 1, 108), ("ort", 2, 101), ("other", 1, 100))
    assert chosen(bundle) == ("ort", 1)
    keep(bundle, ("ort", 1, 112), ("ort", 2, 100), ("other", 2, 99))
    assert chosen(bundle) == ("ort", 2)


def test_a_faster_engine_is_taken_once_it_is_calibrated_without_measuring_again(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    keep(bundle, ("ort", 1, 300), ("other:bf16", 1, 100), ("other:bf16", 2, 400))
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


def test_without_usable_policies_only_the_reference_precision_is_taken(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    keep(bundle, ("ort", 1, 300), ("other", 1, 200), ("other:bf16", 1, 100))
    for content in (None, "{"):
        (bundle_copy / "policies.json").unlink(missing_ok=True)
        if content:
            (bundle_copy / "policies.json").write_text(content)
        assert chosen(bundle) == ("other", 1)


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"versions": {}, "timings": 3, "skipped": {}}', "exits", "nan", "name"]
)
def test_a_damaged_measurement_is_not_relied_on_and_is_replaced(bundle: Bundle, damage: str) -> None:
    timing = {"exits": ("ort", 2, (1.0,)), "nan": ("ort", 2, (-1.0,) * 3), "name": ("tpu", 2, (1.0,) * 3)}
    path = autotune.save(bundle, Tuning(autotune.versions(), (Timing(*timing.get(damage, ("ort", 2, ()))),), {}))
    if damage not in timing:
        path.write_text(damage)
    assert autotune.choose(bundle) == Choice("ort", 1, False, "the measurement of this device cannot be read")
    tune(bundle.path, seconds=0)
    assert autotune.choose(bundle).measured


def test_a_measurement_of_other_packages_is_stale(bundle: Bundle) -> None:
    rows = (Timing("ort", 2, (1.0, 1.0, 1.0)),)
    before = {**autotune.versions(), "onnxruntime": "1.2.3", "openvino": "1900.1"}
    autotune.save(bundle, Tuning(before, rows, {}))
    assert autotune.choose(bundle) == Choice("ort", 1, False, "measured before onnxruntime, openvino changed")
    typed("bench", bundle.path, "--tune", "--repeats", "20", "--batch", "1")
    assert autotune.choose(bundle).measured


def test_what_cannot_be_timed_says_why(bundle: Bundle, monkeypatch) -> None:
    def refuses(*_: object) -> None:
        raise BackendError("the driver is too old")

    monkeypatch.setattr(ort, "refuses", refuses, raising=False)
    monkeypatch.setitem(ENGINES, "gpu", Engine("gpu", "fp32", "fp32", "ort:refuses"))
    monkeypatch.setitem(ENGINES, "ort:int8", Engine("ort", "int8", "int8", "ort:OrtBackend"))
    skipped = tune(bundle.path, seconds=0).skipped
    assert skipped["gpu"] == "the driver is too old"
    assert "export the run again with --precision int8" in skipped["ort:int8"]
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    found = tune(bundle.path, seconds=0)
    assert "pip install 'mexit[cpu]'" in found.skipped["ort"]
    assert (found.rows, found.choice.backend) == ((), "ort")


def test_an_engine_that_says_fp32_and_computes_less_is_not_taken(bundle: Bundle, monkeypatch) -> None:
    """OpenVINO does, unless it is told not to."""

    def bf16(bundle: Bundle, threads: int, precision: str) -> ort.OrtBackend:
        opened = ort.OrtBackend(bundle, threads)
        for segment in opened.segments:
            segment.run = lambda carried, run=segment.run: _as_bf16(*run(carried))
        return opened

    monkeypatch.setattr(ort, "bf16", bf16, raising=False)
    monkeypatch.setitem(ENGINES, "other", dataclasses.replace(PARITY, opener="ort:bf16"))
    monkeypatch.setitem(ENGINES, "other:bf16", dataclasses.replace(ROUNDED, opener="ort:bf16"))
    tuning = autotune.measure(bundle, 0)
    assert {one.backend for one in tuning.timings} == {"ort", "other:bf16"}
    assert "differ from those of ort by" in tuning.skipped["other"]


def _as_bf16(carried: object, logits: np.ndarray) -> tuple[object, np.ndarray]:
    return carried, (logits.view(np.uint32) & 0xFFFF0000).view(np.float32)


def test_a_measured_engine_that_no_longer_opens_names_two_ways_out(bundle: Bundle, monkeypatch) -> None:
    def refuses(*_: object) -> None:
        raise BackendError("no device")

    monkeypatch.setattr(ort, "refuses", refuses, raising=False)
    monkeypatch.setitem(ENGINES, "other", dataclasses.replace(PARITY, opener="ort:refuses"))
    keep(bundle, ("ort", 1, 300), ("other", 1, 100))
    with pytest.raises(BackendError, match=rf"^no device .*bench {bundle.path} --tune .*--backend ort"):
        Runtime.open(bundle.path)
    with pytest.raises(BackendError, match=r"^no device$"):
        Runtime.open(bundle.path, backend="other")
    assert Runtime.open(bundle.path, backend="ort")


def test_a_cache_that_cannot_be_written_stops_the_measurement_alone(bundle, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEXIT_CACHE", str(tmp_path / "file" / "cache"))
    assert Runtime.open(bundle.path, "1000ms").threads == 1
    assert "set MEXIT_CACHE to a folder that can be written" in refused("bench", bundle.path, "--tune", code=1)


def test_a_user_without_a_home_is_told_to_set_the_variable(bundle: Bundle, monkeypatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MEXIT_CACHE")
    monkeypatch.setattr(Path, "home", homeless)
    assert Runtime.open(bundle.path).threads == 1
    with pytest.raises(MexitError, match="set MEXIT_CACHE"):
        tune(bundle.path, seconds=0)


def test_export_times_the_device_at_its_end(workspace: Path, bundle: Bundle, session_cache, monkeypatch) -> None:
    monkeypatch.setenv("MEXIT_CACHE", str(session_cache))
    assert (cache_folder(bundle.id) / "autotune.json").exists()


def test_inspect_and_bench_explain_the_choice(bundle: Bundle) -> None:
    said = typed("inspect", bundle.path).stdout
    assert "auto on this device: ort, 1 thread(s), not measured on this device; mexit bench --tune" in said
    assert json.loads(typed("inspect", bundle.path, "--json").stdout)["tuning"]["rows"] == []
    keep(bundle, ("ort", 1, 300), ("other:bf16", 1, 90), skipped={"trt": "no driver"})
    said = " ".join(typed("inspect", bundle.path).stdout.split())
    assert "the fastest measured here" in said
    assert "not timed: trt: no driver" in said
    assert f"faster once calibrated: mexit calibrate {bundle.path} --backend other:bf16" in said
    found = json.loads(typed("inspect", bundle.path, "--json").stdout)["tuning"]
    assert found["chosen"]["backend"] == "ort"
    assert found["rows"][1]["segments_us"] == [30, 30, 30]
    done = typed("bench", bundle.path, "--tune", "--repeats", "20", "--batch", "1", "--json")
    found = json.loads(done.stdout)
    assert {row["backend"] for row in found["tuning"]["rows"]} == {"ort", "other", "other:bf16"}
    assert found["rows"][0]["threads"] == found["tuning"]["chosen"]["threads"]


# What the kernel grants, as files lie in /proc and /sys.
GROUPS = {
    "v2": ({"cgroup": "0::/a/b", "a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1.5, None),
    "v2 memory": ({"cgroup": "0::/a", "a/memory.max": "max", "memory.max": "1000000"}, None, 1000000),
    "v2 in a container": ({"cgroup": "0::/host/path", "cpu.max": "400000 100000"}, 4.0, None),
    "v1": (
        {"cgroup": "3:cpu,cpuacct:/x", "cpu,cpuacct/x/cpu.cfs_quota_us": "50000",
         "cpu,cpuacct/x/cpu.cfs_period_us": "100000"}, 0.5, None,
    ),
    "v1 without limit": (
        {"cgroup": "3:cpu:/\n4:memory:/y", "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
         "memory/y/memory.limit_in_bytes": "9223372036854771712"}, None, None,
    ),
    "v1 memory": ({"cgroup": "4:memory:/y", "memory/y/memory.limit_in_bytes": "5000"}, None, 5000),
    "both": (
        {"cgroup": "3:cpu:/\n0::/z", "cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000",
         "unified/z/cpu.max": "200000 100000"}, 2.0, None,
    ),
    "nonsense": ({"cgroup": "what\n0::/\n", "cpu.max": "many", "memory.max": "x"}, None, None),
    "nothing": ({}, None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_limits_of_control_groups(name: str, tmp_path: Path) -> None:
    files, quota, memory = GROUPS[name]
    for path, content in files.items():
        full = tmp_path / ("proc/self/cgroup" if path == "cgroup" else f"sys/fs/cgroup/{path}")
        full.parent.mkdir(parents=True, exist_ok=True)
        full.write_text(content + "\n")
    found = read_limits(tmp_path)
    assert (found.quota, found.memory_bytes) == (quota, memory)


def test_threads_follow_the_smaller_of_affinity_and_quota() -> None:
    assert [ResourceLimits(8, quota, None).threads for quota in (None, 0.2, 1.5, 2.0, 64.0)] == [8, 1, 2, 2, 8]
