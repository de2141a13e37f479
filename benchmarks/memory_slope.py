"""Does memory grow with the number of predictions? One million of them, and the same with a planted leak.

    python benchmarks/memory_slope.py BUNDLE [PREDICTIONS]

A process of its own answers calibration images as a program would: uint8 pictures, batches of 1 to 8 (half of the
calls hold one image), every budget in turn, some calls with a deadline or receipts. Resident memory is read every
1,000 predictions or so. Over the second half, the 99 % upper bound of the slope must lie under 4 bytes a
prediction. A check that cannot fail proves nothing: a second process also keeps 16 bytes a prediction.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LIMIT_BYTES = 4.0
PLANTED_BYTES = 16
CONFIDENCE = 0.99
BLOCKS, DRAWS = 25, 4000
SAMPLE_EVERY = 1000
BATCHES = (1, 1, 1, 1, 2, 3, 5, 8)
BUDGETS = ("low", "medium", "high", "full")


@dataclass(frozen=True)
class Slope:
    """Bytes a prediction: from the first to the last sample, and its upper confidence bound."""

    estimate: float
    upper: float

    @property
    def passed(self) -> bool:
        """Whether the bound is under the limit."""
        return self.upper < LIMIT_BYTES


def slope(counts: NDArray[np.int64], resident: NDArray[np.int64], seed: int = 0) -> Slope:
    """Growth over the second half, bounded by a moving-block bootstrap of the increments.

    Memory grows in steps, not along a line with noise around it. So increments are drawn, which treats a step as
    something that can happen again, and in blocks, so that what is freed soon after stays beside what took it.

    Args:
        counts: predictions so far, (N,), rising.
        resident: bytes at that moment, (N,).
        seed: of the draws.
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
    """Answer images and print the samples as JSON. Runs in a process of its own."""
    from mexit import Runtime
    from mexit.data import registry
    from mexit.data.splits import Splits

    runtime = Runtime.open(bundle, backend="ort", threads=1)
    data = registry.load(runtime.bundle.manifest.splits.data_set)
    index = Splits.of_bundle(runtime.bundle).part("calibration")
    images = data.images.at(index)
    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(images) - max(BATCHES), 4096)
    counts, resident = np.zeros(total // SAMPLE_EVERY + 2, np.int64), np.zeros(total // SAMPLE_EVERY + 2, np.int64)
    kept, done, calls, samples = bytearray(), 0, 0, 0
    begin = time.perf_counter()
    while done < total:
        start, size = starts[calls % len(starts)], BATCHES[calls % len(BATCHES)]
        answers = runtime(
            list(images[start : start + size]),
            budget=BUDGETS[calls // len(BATCHES) % len(BUDGETS)],
            deadline_ms=5.0 if calls % 7 == 0 else None,
            receipts=calls % 5 == 0,
        )
        kept += bytes(leak_bytes * len(answers))
        done, calls = done + len(answers), calls + 1
        if done >= samples * SAMPLE_EVERY:
            counts[samples], resident[samples] = done, resident_bytes()
            samples += 1
    seconds = time.perf_counter() - begin
    found = {"counts": counts[:samples].tolist(), "resident": resident[:samples].tolist()}
    print(json.dumps({**found, "calls": calls, "seconds": seconds}))


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(bundle: str, predictions: str = "1000000") -> None:
    from page import table, write_page

    rows, verdicts = [], []
    for name, leak in (("as it is", 0), (f"with {PLANTED_BYTES} bytes a prediction kept", PLANTED_BYTES)):
        command = [sys.executable, __file__, "--work", bundle, predictions, str(leak)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        run = json.loads(done.stdout)
        found = slope(np.array(run["counts"]), np.array(run["resident"]))
        verdicts.append(found.passed)
        marks = [run["resident"][int(share * (len(run["resident"]) - 1))] / 1e6 for share in (0, 0.1, 0.5, 1)]
        rows.append(
            [
                name, f"{run['counts'][-1]:,}", f"{run['calls']:,}", f"{run['seconds']:.0f}",
                " / ".join(f"{mark:.2f}" for mark in marks), f"{found.estimate:.3f}", f"{found.upper:.3f}",
                "under the limit" if found.passed else "FLAGGED",
            ]
        )  # fmt: skip
    columns = ["run", "predictions", "calls", "seconds", "MB at 0 / 10 / 50 / 100 %", "slope", "99 % bound", ""]
    write_page(
        "memory_slope",
        "2-core-cpu",
        "Resident memory over a million predictions",
        [
            f"Bundle `{Path(bundle).name}`, onnxruntime, one thread. Slope in bytes a prediction over the second "
            f"half, limit {LIMIT_BYTES:g}; bound by a moving-block bootstrap ({BLOCKS} blocks, {DRAWS} draws).",
            table(columns, rows),
            f"Passed: {verdicts == [True, False]} (the first must be under the limit, the planted leak must not).",
        ],
    )
    sys.exit(verdicts != [True, False])


if __name__ == "__main__":
    if sys.argv[1] == "--work":
        work(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main(*sys.argv[1:])
