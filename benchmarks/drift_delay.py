"""False alarms and delay of the drift watch's sequential test.

    python benchmarks/drift_delay.py

Streams of watched inputs whose early answers differ from the full network's at a given rate. The test expects 2 %
at most. Null: 1,000 streams of 10,000 at exactly 2 %. Shifts: after 2,000 observations at 2 %, another rate.
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
    """The observation that raised the alarm, from 1; None if none did."""
    test = DriftTest(EXPECTED, ALPHA)
    for place, outcome in enumerate(outcomes.tolist(), start=1):
        if test.observe(outcome):
            return place
    return None


def main() -> None:
    rng = np.random.default_rng(0)
    false = sum(first_alarm(rng.random(LENGTH) < EXPECTED) is not None for _ in range(STREAMS))
    rows = []
    for rate in RATES:
        delays, early = [], 0
        for _ in range(SHIFT_STREAMS):
            stream = np.concatenate([rng.random(CALM) < EXPECTED, rng.random(SHIFTED) < rate])
            place = first_alarm(stream)
            early += place is not None and place <= CALM
            if place is None or place > CALM:
                delays.append(SHIFTED if place is None else place - CALM)
        seen = np.mean(np.array(delays) < SHIFTED)
        quartiles = np.quantile(delays, [0.25, 0.5, 0.75])
        rows.append(
            [f"{rate:.0%}", f"{seen:.1%}", *(f"{value:.0f}" for value in quartiles), SHIFT_STREAMS - early]
        )
    write_page(
        "drift_delay",
        "2-core-cpu",
        "The drift watch: false alarms and delay",
        [
            f"Expected rate {EXPECTED:.0%}, alarm level {ALPHA:.0%}. Null: {false} of {STREAMS} streams of "
            f"{LENGTH:,} observations at exactly {EXPECTED:.0%} ever raised the alarm; "
            f"{ALPHA * STREAMS:.0f} are allowed.",
            f"Observations from the shift (after {CALM:,} calm ones) to the alarm; {SHIFTED:,} where it came too "
            "late. One observation is one watched input: at a watched share of 1 % multiply by 100.",
            table(["rate after the shift", "seen", "quartile", "median", "quartile", "n"], rows),
        ],
    )


if __name__ == "__main__":
    main()
