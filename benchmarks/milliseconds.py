"""Is a budget in milliseconds kept? Measured mean time against the promise, in the same run.

    python benchmarks/milliseconds.py BUNDLE

Times per exit are measured first, as `Runtime` does for a budget such as 5ms; then the calibration images are
answered one by one at three such budgets, in turn. Target: the measured mean at most 5 % over the promise.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from page import table, write_page

from mexit import Runtime
from mexit.data import catalog
from mexit.data.splits import Splits
from mexit.runtime.times import expected_ms, measure, place_within

ROUNDS = 5


def main(bundle: str) -> None:
    runtime = Runtime.open(bundle, "full")
    manifest = runtime.bundle.manifest
    entry = runtime.bundle.policies().entries[0]
    data = catalog.load(manifest.splits.data_set)
    splits = Splits.from_bytes(runtime.bundle.splits(), runtime.bundle.path)
    images = data.batch(splits.part("calibration")[:500], manifest.input)
    rows = []
    for round_ in range(ROUNDS):
        times = measure(runtime.rehearse, len(manifest.exits))
        for share in (0.25, 0.5, 0.75):
            limit = times[0] + share * (times[-1] - times[0])
            point = entry.frontier[place_within(entry.frontier, limit, times)]
            spent = []
            for image in images:
                begin = time.perf_counter()
                runtime.answer_tensor(image[None], budget=f"{point.budget_macs:.0f}")
                spent.append((time.perf_counter() - begin) * 1e3)
            promise, seen = expected_ms(point, times), float(np.mean(spent))
            rows.append([round_ + 1, f"{limit:.3f}", f"{promise:.3f}", f"{seen:.3f}", f"{seen / promise:.3f}"])
    ratios = [float(row[-1]) for row in rows]
    write_page(
        "milliseconds",
        "2-core-cpu",
        f"Budgets in milliseconds on `{manifest.name}`",
        [
            table(["round", "budget, ms", "promised mean, ms", "measured mean, ms", "ratio"], rows),
            f"Ratio: median {np.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}; "
            f"{len(images)} images a row, one thread.",
        ],
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
