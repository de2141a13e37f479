"""Measure the duration of calibration for N = 10,000 samples and 7 exits on one core.

    python benchmarks/calibration_speed.py [--repeats 15]

Measures 39 geometric budgets (MSDNet's protocol) from scores, the same protocol as plain loops, and the whole search
frontier. Targets: 50 ms and 5 s. Set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from page import table, write_page

from mexit.calibrate.geometric import Ranking, geometric
from mexit.calibrate.threshold_search import search_thresholds
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.cost import Costs

SAMPLES, EXITS = 10_000, 7
BUDGETS = [p / 20 for p in range(1, 40)]


def make(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and correctness, (E, N) each; both rise with the exit."""
    rng = np.random.default_rng(seed)
    hardness = rng.normal(size=SAMPLES)
    scores = -hardness + rng.normal(scale=0.7, size=(EXITS, SAMPLES))
    correct = scores + rng.normal(size=(EXITS, SAMPLES)) + 0.3 * np.arange(EXITS)[:, None] > -0.5
    return scores, correct


def plain_loops(scores: np.ndarray, q: float) -> None:
    """The published protocol, sample by sample."""
    probability = np.array([q**k for k in range(1, EXITS + 1)])
    probability /= probability.sum()
    gone = np.zeros(SAMPLES, bool)
    for k in range(EXITS - 1):
        quota, count, threshold = int(SAMPLES * probability[k]), 0, 1e8
        for row in np.argsort(-scores[k]):
            if not gone[row]:
                count += 1
                threshold = scores[k, row]
                if count == quota:
                    break
        for row in range(SAMPLES):
            if not gone[row] and scores[k, row] >= threshold:
                gone[row] = True


def timed(call: Callable[[], object]) -> float:
    """The duration of a call in seconds."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    costs = Costs(tuple(range(10, 10 + 10 * EXITS, 10)), 10 * EXITS)
    fast, searched = [], []
    for seed in range(repeats):
        scores, correct = make(seed)
        fast.append(timed(lambda s=scores: [geometric(ranking, q) for ranking in [Ranking.of(s)] for q in BUDGETS]))
        evaluator = TraceEvaluator(scores, correct.astype(np.int64), np.ones(SAMPLES, np.int64), costs)
        searched.append(timed(lambda e=evaluator: search_thresholds(e)))
    slow = [timed(lambda q=q: plain_loops(scores, q)) for q in BUDGETS[::6]]
    per_budget = float(np.median(slow))
    rows = [
        ["39 geometric budgets", *(f"{1e3 * f(fast):.1f} ms" for f in (min, np.median, max)), repeats, "50 ms"],
        ["whole search frontier", *(f"{f(searched):.2f} s" for f in (min, np.median, max)), repeats, "5 s"],
        ["39 budgets as plain loops", "", f"{39 * per_budget:.1f} s", "", len(slow), ""],
    ]
    write_page(
        "calibration_speed",
        "2-core-cpu",
        f"Calibration of {EXITS} exits on {SAMPLES:,} samples",
        [
            table(["", "min", "median", "max", "n", "target"], rows),
            "The plain loops are 39 times the median of the budgets that were timed.",
        ],
    )


if __name__ == "__main__":
    main()
