"""The latencies and the notes of `mexit bench`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mexit.commands.bench import show_bench
from mexit.flows.bench import BenchResult, Row, bench_bundle


def bench_result(**mean_us: float) -> BenchResult:
    """A result with these means at batch 1, and a `full` of 5 us at batch 8."""
    rows = [Row("ort", 1, 1, path, mean, mean, mean, 20) for path, mean in mean_us.items()]
    return BenchResult((*rows, Row("ort", 1, 8, "full", 5.0, 5.0, 5.0, 20)), {"cpu": "one"}, "images")


def test_every_path_is_timed_at_every_batch_size(mixed_bundle: Path) -> None:
    rows = bench_bundle(mixed_bundle, batches=[1, 3], repeats=20).rows
    paths = ["full", "exit 1", "low", "medium", "high"]
    assert [(row.batch, row.path) for row in rows] == [(batch, path) for batch in (1, 3) for path in paths]
    assert all(row.n == 20 and 0 < row.p50_us <= row.p95_us for row in rows)


def test_random_images_replace_a_missing_data_set(bundle_copy: Path) -> None:
    assert "calibration images of digits" in bench_bundle(bundle_copy, batches=[1], repeats=20).images
    manifest = json.loads((bundle_copy / "bundle.json").read_text())
    (bundle_copy / "bundle.json").write_text(json.dumps({**manifest, "splits": None}))
    (bundle_copy / "policies.json").unlink()
    result = bench_bundle(bundle_copy, batches=[1], repeats=20)
    assert result.images.startswith("random images")
    assert [row.path for row in result.rows] == ["full", "exit 1"]


def test_budgets_slower_than_full_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """The means are compared at the same batch size."""
    slow = bench_result(full=10.0, low=8.0, high=11.0)
    assert slow.slower_than_full() == [("high", 1)]
    show_bench(slow)
    printed = " ".join(capsys.readouterr().out.split())
    assert "slower here than full, which runs no early heads: high (batch 1);" in printed


def test_without_slower_budgets_there_is_no_note(capsys: pytest.CaptureFixture[str]) -> None:
    show_bench(bench_result(full=10.0, low=8.0))
    assert "slower" not in capsys.readouterr().out
