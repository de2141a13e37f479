"""Measure how resident memory grows with the number of predictions, as it is and with a planted leak.

    python benchmarks/memory_slope.py BUNDLE [PREDICTIONS]

A separate process answers calibration images: uint8 arrays, batches of 1 to 8 (half of the calls hold one image),
each budget in turn, some calls with a deadline or receipts. It reads its resident memory about every 1,000 predictions.
Over the second half, the 99 % upper bound of the slope must lie under 4 bytes per prediction. A second process leaks
16 bytes per prediction, which the check must detect. The default is one million predictions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIMIT_BYTES = 4.0
PLANTED_BYTES = 16
CONFIDENCE = 0.99
BLOCKS, DRAWS = 25, 4000
SAMPLE_EVERY = 1000
BATCHES = (1, 1, 1, 1, 2, 3, 5, 8)
BUDGETS = ("low", "medium", "high", "full")
MEASURED = ("seconds", "MB at 0 / 10 / 50 / 100 %", "slope", "99 % bound", "")  # the columns of `measured`


@dataclass(frozen=True)
class Slope:
    """Growth in bytes per prediction: estimate and upper confidence bound."""

    estimate: float
    upper: float

    @property
    def passed(self) -> bool:
        """Whether the upper bound is under the limit."""
        return self.upper < LIMIT_BYTES


def slope(counts: NDArray[np.int64], resident: NDArray[np.int64], seed: int = 0) -> Slope:
    """Estimate the growth over the second half, with a moving-block bootstrap of the increments.

    Memory grows in steps, not along a line with noise. The bootstrap therefore draws increments, so that a step can
    recur; and blocks of them, so that an allocation and its release stay together.

    Args:
        counts: predictions before each sample, (N,) int64, increasing.
        resident: resident memory in bytes at each sample, (N,) int64.
        seed: seed of the bootstrap.
    """
    half = len(counts) // 2
    predictions, growth = np.diff(counts[half:]), np.diff(resident[half:])
    length = max(1, len(growth) // BLOCKS)
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(growth) - length + 1, (DRAWS, -(-len(growth) // length)))
    sums = [np.concatenate([[0], np.cumsum(values)]) for values in (growth, predictions)]
    grown, made = ((total[starts + length] - total[starts]).sum(axis=1) for total in sums)
    return Slope(float(growth.sum() / predictions.sum()), float(np.quantile(grown / made, CONFIDENCE)))


def work(bundle: str, total: int, leak_bytes: int) -> None:
    """Answer images and print the samples as JSON. Runs in its own process."""
    from mexit import Runtime
    from mexit.data import registry
    from mexit.data.splits import Splits

    runtime = Runtime.open(bundle, backend="ort", threads=1)
    splits = Splits.of_bundle(runtime.bundle)
    images = registry.load(splits.data_set).images.at(splits.part("calibration"))
    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(images) - max(BATCHES), 4096)
    counts, resident = np.zeros(total // SAMPLE_EVERY + 2, np.int64), np.zeros(total // SAMPLE_EVERY + 2, np.int64)
    leak, done, calls, samples = bytearray(), 0, 0, 0
    begin = time.perf_counter()
    while done < total:
        start, size = starts[calls % len(starts)], BATCHES[calls % len(BATCHES)]
        answers = runtime(
            list(images[start : start + size]),
            budget=BUDGETS[calls // len(BATCHES) % len(BUDGETS)],
            deadline_ms=5.0 if calls % 7 == 0 else None,
            receipts=calls % 5 == 0,
        )
        leak += bytes(leak_bytes * len(answers))
        done, calls = done + len(answers), calls + 1
        if done >= samples * SAMPLE_EVERY:
            counts[samples], resident[samples] = done, resident_bytes()
            samples += 1
    seconds = time.perf_counter() - begin
    series = {"counts": counts[:samples].tolist(), "resident": resident[:samples].tolist()}
    print(json.dumps({**series, "calls": calls, "seconds": seconds}))


def resident_bytes() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measured(command: Sequence[str]) -> tuple[dict[str, Any], Slope, list[str]]:
    """Run one case in a process of its own: what it printed, its slope, and the last cells of its row."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    run = json.loads(done.stdout)
    growth = slope(np.array(run["counts"]), np.array(run["resident"]))
    marks = [run["resident"][int(share * (len(run["resident"]) - 1))] / 1e6 for share in (0, 0.1, 0.5, 1)]
    cells = [
        f"{run['seconds']:.0f}", " / ".join(f"{mark:.2f}" for mark in marks), f"{growth.estimate:.3f}",
        f"{growth.upper:.3f}", "under the limit" if growth.passed else "FLAGGED",
    ]  # fmt: skip
    return run, growth, cells


def main(bundle: str, predictions: str = "1000000") -> None:
    """Measure and write the page; exit with 1 if a check fails."""
    from page import table, write_page

    rows, passed = [], []
    for name, leak in (("as it is", 0), (f"with a leak of {PLANTED_BYTES} bytes per prediction", PLANTED_BYTES)):
        run, growth, cells = measured([sys.executable, __file__, "--work", bundle, predictions, str(leak)])
        passed.append(growth.passed)
        rows.append([name, f"{run['counts'][-1]:,}", f"{run['calls']:,}", *cells])
    columns = ["run", "predictions", "calls", *MEASURED]
    write_page(
        "memory_slope",
        "2-core-cpu",
        f"Resident memory over {int(predictions):,} predictions",
        [
            f"Bundle `{Path(bundle).name}`, onnxruntime, one thread. Slope in bytes per prediction over the second "
            f"half, limit {LIMIT_BYTES:g}; bound by a moving-block bootstrap ({BLOCKS} blocks, {DRAWS} draws).",
            table(columns, rows),
            f"Passed: {passed == [True, False]} (the first must be under the limit, the planted leak must not).",
        ],
    )
    sys.exit(passed != [True, False])


if __name__ == "__main__":
    if sys.argv[1] == "--work":
        work(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main(*sys.argv[1:])
