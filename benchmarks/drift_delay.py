"""Measure false alarms and detection delay of the drift test.

    python benchmarks/drift_delay.py [--streams 1000] [--shift-streams 200]

Early answers of the watched inputs of a stream differ from those of the full network at a given rate. The test expects
at most 2 %. Null hypothesis: streams of 10,000 inputs at exactly 2 %. Shifts: another rate after 2,000 inputs.
"""

from __future__ import annotations

import argparse

import numpy as np
from page import table, write_page

from mexit.runtime.drift import DriftTest

EXPECTED, ALPHA = 0.02, 0.01
LENGTH = 10_000
BEFORE_SHIFT, AFTER_SHIFT = 2000, 4000
RATES = (0.03, 0.04, 0.06, 0.1, 0.2, 0.5)


def first_alarm(outcomes: np.ndarray) -> int | None:
    """The observation (from 1) that raised the alarm; None without an alarm."""
    test = DriftTest(EXPECTED, ALPHA)
    for number, outcome in enumerate(outcomes.tolist(), start=1):
        if test.observe(outcome):
            return number
    return None


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000, help="under the null hypothesis")
    parser.add_argument("--shift-streams", type=int, default=200, help="for each rate after the shift")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    false_alarms = sum(first_alarm(rng.random(LENGTH) < EXPECTED) is not None for _ in range(arguments.streams))
    rows = []
    for rate in RATES:
        delays, early = [], 0
        for _ in range(arguments.shift_streams):
            stream = np.concatenate([rng.random(BEFORE_SHIFT) < EXPECTED, rng.random(AFTER_SHIFT) < rate])
            alarm = first_alarm(stream)
            early += alarm is not None and alarm <= BEFORE_SHIFT
            if alarm is None or alarm > BEFORE_SHIFT:
                delays.append(AFTER_SHIFT if alarm is None else alarm - BEFORE_SHIFT)
        detected = np.mean(np.array(delays) < AFTER_SHIFT)
        quartiles = np.quantile(delays, [0.25, 0.5, 0.75])
        rows.append(
            [
                f"{rate:.0%}",
                f"{detected:.1%}",
                *(f"{value:.0f}" for value in quartiles),
                arguments.shift_streams - early,
            ]
        )
    write_page(
        "drift_delay",
        "2-core-cpu",
        "The drift test: false alarms and delay",
        [
            f"Expected rate {EXPECTED:.0%}, alarm level {ALPHA:.0%}. Null: {false_alarms} of "
            f"{arguments.streams} streams of {LENGTH:,} observations at exactly {EXPECTED:.0%} raised the alarm; "
            f"{ALPHA * arguments.streams:.0f} are allowed.",
            f"Observations from the shift (after {BEFORE_SHIFT:,} before it) to the alarm; {AFTER_SHIFT:,} without an "
            "alarm by then. One observation is one watched input: at a watched share of 1 % multiply by 100.",
            table(["rate after the shift", "detected", "quartile", "median", "quartile", "n"], rows),
        ],
    )


if __name__ == "__main__":
    main()
