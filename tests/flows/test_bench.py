"""What `mexit bench` says of its own numbers."""

from __future__ import annotations

import pytest

from mexit.commands.bench import show_bench
from mexit.flows.bench import BenchResult, Row


def result(**mean_us: float) -> BenchResult:
    rows = [Row("ort", 1, 1, path, mean, mean, mean, 20) for path, mean in mean_us.items()]
    return BenchResult((*rows, Row("ort", 1, 8, "full", 5.0, 5.0, 5.0, 20)), {"cpu": "one"}, "images")


def test_budgets_that_are_slower_than_full_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Compared in the mean and at the same batch."""
    found = result(full=10.0, low=8.0, high=11.0)
    assert found.slower_than_full() == [("high", 1)]
    show_bench(found)
    assert "slower here than full, which runs no early heads: high (batch 1);" in " ".join(
        capsys.readouterr().out.split()
    )


def test_nothing_is_said_where_none_is(capsys: pytest.CaptureFixture[str]) -> None:
    show_bench(result(full=10.0, low=8.0))
    assert "slower" not in capsys.readouterr().out
