"""The times of `mexit bench`, and what it says about early exit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mexit.calibrate.against_static import compare_with_static
from mexit.commands.bench import show_bench
from mexit.core.bundle import Bundle
from mexit.errors import UsageError
from mexit.flows.bench import bench_bundle
from mexit.flows.bench_result import BenchResult, Row
from mexit.flows.paired_times import Ratio

EXACT = Ratio(1.0, 1.0, 1.0)


def result(real: bool = True, **of_static: tuple[float, float]) -> BenchResult:
    """A result at batch 1 whose budgets take these shares of the static network's time, with half their interval."""
    rows = [Row("ort", 1, 1, "full", 10.0, 10.0, 10.0, 20, EXACT)]
    for path, (value, half) in of_static.items():
        ratio = Ratio(value, value - half, value + half)
        rows.append(Row("ort", 1, 1, path, 9.0, 9.0, 9.0, 20, ratio, 1e6, -0.001, 0.002))
    return BenchResult(tuple(rows), {"cpu": "one"}, "macs", "images", real, "100 certification images", ["a", "b", "c"])


def printed(capsys: pytest.CaptureFixture[str], shown: BenchResult) -> str:
    show_bench(shown)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    return " ".join(" ".join(lines).split())


def test_every_budget_is_compared_at_every_batch_size(mixed_bundle: Path) -> None:
    found = bench_bundle(mixed_bundle, batches=[1, 3], repeats=20)
    paths = ["full", "exit 1", "low", "medium", "high"]
    assert [(row.batch, row.path) for row in found.rows] == [(batch, path) for batch in (1, 3) for path in paths]
    assert all(row.n == 20 and 0 < row.p50_us <= row.p95_us for row in found.rows)
    assert all(row.of_static == EXACT for row in found.rows if row.path == "full")
    assert all(row.of_static.low < row.of_static.value < row.of_static.high for row in found.rows if row.is_budget)


def test_expected_accuracy_and_cost_come_from_the_certification_trace(mixed_bundle: Path) -> None:
    rows = {row.path: row for row in bench_bundle(mixed_bundle, batches=[1], repeats=20).rows}
    bundle = Bundle.open(mixed_bundle)
    [entry] = bundle.policies().entries
    [clean] = [ref for ref in entry.evidence if ref.condition == "clean"]
    for name in ("low", "medium", "high"):
        policy = entry.policy(entry.frontier[entry.named[name]])
        expected = compare_with_static(bundle.load_trace(clean), policy, bundle.manifest.costs)
        change = expected.accuracy_change
        assert change is not None
        found = rows[name]
        assert (found.macs, found.accuracy_change) == (expected.cost.value, change.value)
        assert found.accuracy_error == change.stderr
    assert rows["full"].accuracy_change == rows["full"].accuracy_error == 0
    macs = [rows[name].macs or 0 for name in ("low", "medium", "high", "full")]
    assert macs == sorted(macs)
    assert rows["exit 1"].macs is None


def test_random_images_replace_a_missing_data_set(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "calibration images of digits" in bench_bundle(bundle_copy, batches=[1], repeats=20).images
    manifest = json.loads((bundle_copy / "bundle.json").read_text())
    (bundle_copy / "bundle.json").write_text(json.dumps({**manifest, "splits": None}))
    (bundle_copy / "policies.json").unlink()
    found = bench_bundle(bundle_copy, batches=[1], repeats=20)
    assert found.images.startswith("random images")
    assert [row.path for row in found.rows] == ["full", "exit 1"]
    assert "run mexit calibrate" in printed(capsys, found)


def test_the_verdict_names_the_budget_that_saves_most(capsys: pytest.CaptureFixture[str]) -> None:
    shown = result(low=(0.6, 0.05), medium=(0.72, 0.01), high=(1.1, 0.02))
    assert shown.to_json()["saves_time"]
    text = printed(capsys, shown)
    assert "Early exit saves time here: low takes 0.60 ± 0.05 of the static network's time at batch 1" in text
    assert "expected accuracy change of -0.1 ± 0.2 points" in text
    assert "slower here than the static network: high (batch 1, 1.10 ± 0.02)" in text


def test_budgets_are_selected_by_time(bundle_copy: Path, tmp_path: Path) -> None:
    """`--tune` measures the times again; without `--cost time` the advice names it."""
    in_macs = bench_bundle(bundle_copy, batches=[1], repeats=20)
    assert in_macs.cost == "macs"
    assert any("--cost time" in one for one in in_macs.advice)
    in_time = bench_bundle(bundle_copy, batches=[1], repeats=20, cost="time")
    assert in_time.cost == in_time.to_json()["cost"] == "time"
    assert not any("--cost time" in one for one in in_time.advice)
    [stored] = (tmp_path / "device-cache").rglob("policies-*.json")
    before = stored.stat().st_mtime_ns
    bench_bundle(bundle_copy, batches=[1], repeats=20, cost="time")
    assert stored.stat().st_mtime_ns == before
    bench_bundle(bundle_copy, batches=[1], repeats=20, cost="time", tune=True)
    assert stored.stat().st_mtime_ns > before


@pytest.mark.parametrize("numbers", [{"repeats": 19}, {"batches": [1, 0]}, {"batches": []}])
def test_numbers_that_are_too_small_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--repeats must be at least 20 and each --batch at least 1"):
        bench_bundle(Path("bundle"), **numbers)


def test_a_budget_that_loses_accuracy_comes_second() -> None:
    shown = result(low=(0.6, 0.05), medium=(0.72, 0.01))
    full, low, medium = shown.rows
    lossy = Row(**{**vars(low), "accuracy_change": -0.02})
    assert BenchResult((full, lossy, medium), {}, "macs", "images").fastest() == medium
    assert BenchResult((full, lossy), {}, "macs", "images").fastest() == lossy


def test_without_a_significant_saving_the_verdict_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    shown = result(low=(0.98, 0.03), medium=(1.01, 0.02))
    assert not shown.to_json()["saves_time"]
    text = printed(capsys, shown)
    assert "Early exit saves no time here at batch 1" in text
    assert "use full, or try a, b or c." in text
    assert "slower here" not in text


def test_times_that_vary_too_much_are_no_evidence_against_early_exit() -> None:
    shown = result(low=(0.6, 0.5), medium=(0.99, 0.02))
    assert not shown.to_json()["saves_time"]
    assert "vary too much to say whether early exit saves time here: low takes 0.60 ± 0.50 of" in shown.verdict()
    assert "saves time here: medium takes" in result(low=(0.6, 0.5), medium=(0.9, 0.02)).verdict()


def test_random_images_give_no_verdict() -> None:
    shown = result(real=False, low=(0.5, 0.01))
    assert not shown.to_json()["saves_time"]
    assert "--data-dir" in shown.verdict()
