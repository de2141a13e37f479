"""Compare the measured mean time of budgets in milliseconds with the promised one.

    python benchmarks/milliseconds.py BUNDLE [--rounds 20]

Every round measures the latency profile, as `Runtime` does for a budget such as 5ms, and then runs the
calibration images one by one at three such budgets. Target: over all rounds, the mean measured for a budget is at
most 5 % over the mean promised. The page also shows the spread of single rounds.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from page import table, write_page

from mexit import Runtime
from mexit.data import registry
from mexit.data.splits import Splits
from mexit.runtime.latency_profile import expected_us, index_within
from mexit.runtime.profile_cache import new_profile

SHARES = (0.25, 0.5, 0.75)  # of the way from the time of exit 1 to that of the static network


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    runtime = Runtime.open(arguments.bundle, "full")
    manifest = runtime.bundle.manifest
    entry = runtime.bundle.policies().entries[0]
    splits = Splits.of_bundle(runtime.bundle)
    images = registry.load(splits.data_set).batch(splits.part("calibration")[:500], manifest.input)
    promised, measured = np.zeros((2, len(SHARES), arguments.rounds))
    for round_ in range(arguments.rounds):
        times = new_profile(runtime.bundle, runtime.backend, runtime.threads, runtime.timed_calls()).costs
        for i, share in enumerate(SHARES):
            limit_us = times.first + share * (times.static - times.first)
            point = entry.frontier[index_within(entry.frontier, limit_us / 1e3, times)]
            spent = []
            for image in images:
                begin = time.perf_counter()
                runtime.answer_tensor(image[None], budget=f"{point.budget_macs:.0f}")
                spent.append((time.perf_counter() - begin) * 1e3)
            promised[i, round_], measured[i, round_] = expected_us(point, times) / 1e3, np.mean(spent)
    rows = []
    for share, promises, means in zip(SHARES, promised, measured, strict=True):
        ratios = means / promises
        low, median, high = np.quantile(ratios, (0.1, 0.5, 0.9))
        spread = f"{median:.3f} ({low:.3f} to {high:.3f})"
        together = f"{means.mean() / promises.mean():.3f}"
        rows.append([f"{share:.0%}", f"{promises.mean():.3f}", f"{means.mean():.3f}", together, spread])
    write_page(
        "milliseconds",
        "2-core-cpu",
        f"Budgets in milliseconds on `{manifest.name}`",
        [
            table(
                [
                    "budget",
                    "promised mean, ms",
                    "measured mean, ms",
                    "ratio",
                    "single rounds: median (10 to 90 %)",
                ],
                rows,
            ),
            "Budget: share of the way from the time of exit 1 to that of the static network. "
            f"{arguments.rounds} rounds of {len(images)} images per budget, one thread.",
        ],
    )


if __name__ == "__main__":
    main()
