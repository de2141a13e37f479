"""False alarms and detection delay of the drift test.

    python benchmarks/drift_delay.py

Streams of watched inputs whose early answers differ from those of the full network at a given rate. The test expects
at most 2 %. Null hypothesis: 1,000 streams of 10,000 at exactly 2 %. Shifts: another rate after 2,000 observations.
"""

from __future__ import annotations

import numpy as np
from page import table, write_page

from mexit.runtime.drift import DriftTest

EXPECTED, ALPHA = 0.02, 0.01
STREAMS, LENGTH = 1000, 10_000
CALM, SHIFTED, SHIFT_STREAMS = 2000, 4000, 200
RATES = (0.03, 0.04, 0.06, 0.1, 0.2, 0.5)


def first_alarm(outcomes: np.ndarray) -> int | None:
    """The observation (from 1) that raised the alarm; None without an alarm."""
    test = DriftTest(EXPECTED, ALPHA)
    for number, outcome in enumerate(outcomes.tolist(), start=1):
        if test.observe(outcome):
            return number
    return None


def main() -> None:
    rng = np.random.default_rng(0)
    false = sum(first_alarm(rng.random(LENGTH) < EXPECTED) is not None for _ in range(STREAMS))
    rows = []
    for rate in RATES:
        delays, early = [], 0
        for _ in range(SHIFT_STREAMS):
            stream = np.concatenate([rng.random(CALM) < EXPECTED, rng.random(SHIFTED) < rate])
            alarm = first_alarm(stream)
            early += alarm is not None and alarm <= CALM
            if alarm is None or alarm > CALM:
                delays.append(SHIFTED if alarm is None else alarm - CALM)
        detected = np.mean(np.array(delays) < SHIFTED)
        quartiles = np.quantile(delays, [0.25, 0.5, 0.75])
        rows.append([f"{rate:.0%}", f"{detected:.1%}", *(f"{value:.0f}" for value in quartiles), SHIFT_STREAMS - early])
    write_page(
        "drift_delay",
        "2-core-cpu",
        "The drift watch: false alarms and delay",
        [
            f"Expected rate {EXPECTED:.0%}, alarm level {ALPHA:.0%}. Null: {false} of {STREAMS} streams of "
            f"{LENGTH:,} observations at exactly {EXPECTED:.0%} ever raised the alarm; "
            f"{ALPHA * STREAMS:.0f} are allowed.",
            f"Observations from the shift (after {CALM:,} before it) to the alarm; {SHIFTED:,} without an alarm "
            "by then. One observation is one watched input: at a watched share of 1 % multiply by 100.",
            table(["rate after the shift", "detected", "quartile", "median", "quartile", "n"], rows),
        ],
    )


if __name__ == "__main__":
    main()
