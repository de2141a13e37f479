"""The result of `mexit bench`: times and expected accuracy of every budget against the static network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mexit.flows.paired_times import Ratio
from mexit.runtime import autotune

STATIC = "full"  # the budget that runs the static network
UNCLEAR = 0.1  # share of the static network's time that a budget may save unseen where times vary
SMALL_LOSS = 0.005  # share of the images; a budget that loses more is named only if no other one saves time


@dataclass(frozen=True)
class Row:
    """One path at one batch size.

    Attributes:
        engine: name of the engine.
        threads: threads of the engine.
        batch: images per call.
        path: "full" (the static network), "exit K", or the name of a budget.
        p50_us: median duration of a call in microseconds. For single images, this is the latency of one exit.
        p95_us: 95th percentile in microseconds.
        mean_us: mean in microseconds, which is what early exit lowers.
        n: number of timed calls.
        of_static: mean time as a share of that of `full`.
        macs: expected mean MACs of an image; None for "exit K" and without calibration.
        accuracy_change: expected accuracy minus that of the static network, a share; None where it is unknown.
        accuracy_error: standard error of `accuracy_change`.
    """

    engine: str
    threads: int
    batch: int
    path: str
    p50_us: float
    p95_us: float
    mean_us: float
    n: int
    of_static: Ratio
    macs: float | None = None
    accuracy_change: float | None = None
    accuracy_error: float | None = None

    @property
    def is_budget(self) -> bool:
        """Whether the path is a budget that may exit early."""
        return self.path != STATIC and not self.path.startswith("exit ")


@dataclass(frozen=True)
class BenchResult:
    """Every budget of a bundle against the static network.

    Attributes:
        rows: one row per path and batch size.
        machine: processor, number of cores and system.
        cost: unit in which the budgets were selected, "macs" or "time".
        images: description of the timed images.
        real_images: whether they are images of the data set; random ones leave at other exits.
        expected_on: description of the images behind the expected accuracies and MACs; "" without calibration.
        advice: what can be done where early exit saves no time, one part of a sentence each.
        tuning: comparison of the engines; None unless it was requested.
    """

    rows: tuple[Row, ...]
    machine: dict[str, Any]
    cost: str
    images: str
    real_images: bool = True
    expected_on: str = ""
    advice: Sequence[str] = ()
    tuning: autotune.Explanation | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the object of `mexit bench --json`."""
        fields = {
            "rows": [asdict(row) for row in self.rows],
            "machine": self.machine,
            "cost": self.cost,
            "images": self.images,
            "expected_on": self.expected_on,
            "saves_time": self.fastest() is not None,
            "verdict": self.verdict(),
        }
        return {**fields, "tuning": self.tuning.to_json()} if self.tuning else fields

    @property
    def batch(self) -> int:
        """The smallest batch size, which the verdict is about."""
        return min(row.batch for row in self.rows)

    def budgets(self) -> list[Row]:
        """The budgets that may exit early, at the smallest batch size."""
        return [row for row in self.rows if row.is_budget and row.batch == self.batch]

    def fastest(self) -> Row | None:
        """The budget that saves the most time at the smallest batch size; None if none saves time significantly.

        Budgets that are expected to lose at most half a point come first.
        """
        if not self.real_images:
            return None
        faster = sorted((row for row in self.budgets() if row.of_static.high < 1), key=lambda row: row.of_static.value)
        good = [row for row in faster if (row.accuracy_change or 0.0) >= -SMALL_LOSS]
        return next(iter([*good, *faster]), None)

    def unclear(self) -> Row | None:
        """The fastest budget whose interval reaches from a clear saving to none, at the smallest batch size."""
        rows = [row for row in self.budgets() if row.of_static.low < 1 - UNCLEAR and row.of_static.high >= 1]
        return min(rows, key=lambda row: row.of_static.value, default=None)

    def slower_than_static(self) -> list[Row]:
        """The budgets that are significantly slower than the static network, at any batch size."""
        return [row for row in self.rows if row.is_budget and row.of_static.low > 1]

    def verdict(self) -> str:
        """One sentence: whether early exit saves time here, and if not, what to do."""
        if not self.budgets():
            return "There are no budgets to compare with the static network: run mexit calibrate."
        if not self.real_images:
            return (
                "Random images say nothing about early exit: name the folder of the data sets with --data-dir to "
                "compare budgets with the static network."
            )
        best = self.fastest()
        if best is None and (unclear := self.unclear()):
            return (
                f"The times vary too much to say whether early exit saves time here: {unclear.path} takes "
                f"{share(unclear.of_static)} of the static network's time at batch {self.batch}; repeat it on a quiet "
                "machine, or with more --repeats."
            )
        if best is None:
            return (
                f"Early exit saves no time here at batch {self.batch}: no budget is significantly faster than the "
                f"static network; use full, or try {_listed(self.advice)}."
            )
        change = ""
        if best.accuracy_change is not None:
            change = f", at an expected accuracy change of {points(best.accuracy_change, best.accuracy_error)} points"
        return (
            f"Early exit saves time here: {best.path} takes {share(best.of_static)} of the static network's time at "
            f"batch {self.batch}{change}."
        )


def share(ratio: Ratio) -> str:
    """A ratio for people: `0.72 ± 0.01`, with half the width of its 95 % interval."""
    return f"{ratio.value:.2f} ± {(ratio.high - ratio.low) / 2:.2f}"


def points(change: float | None, error: float | None) -> str:
    """A change of a share for people, in points: `-0.1 ± 0.2`, with its standard error."""
    if change is None:
        return "-"
    return f"{100 * change:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _listed(parts: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    *first, last = parts
    return f"{', '.join(first)} or {last}" if first else last
