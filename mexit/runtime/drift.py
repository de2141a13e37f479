"""Watches a small share of inputs that left early: would the full network have said the same?

Each watched input runs to the last exit after its answer is out; what that costs is in the ledger. A sequential
test a frontier point compares the rate of disagreement with the one that was measured at calibration; its alarm is
false with probability alpha at most, ever. An alarm is logged once and can move the runtime to a safer point.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mexit.core.policies import PolicyEntry
from mexit.errors import NotCalibrated, UsageError
from mexit.runtime.drift_test import DriftTest

ACTIONS = ("alarm", "safer")
_LOG = logging.getLogger("mexit.drift")


class DriftWatch:
    """The drift tests of one runtime; safe to share between threads."""

    def __init__(self, entry: PolicyEntry, share: float, action: str = "alarm", seed: int | None = None) -> None:
        """Start watching.

        Args:
            entry: of the engine; holds the expected rates.
            share: of the inputs that left early, in (0, 1], that are watched.
            action: "alarm" only says so; "safer" also moves to the cheapest certified point above, or to the
                full network where nothing is certified.
            seed: of the choice of inputs; None lets nobody foresee it.
        """
        if not 0 < share <= 1:
            raise UsageError(f"the watched share must lie in (0, 1], found {share}")
        if action not in ACTIONS:
            raise UsageError(f"unknown action '{action}': choose from {', '.join(ACTIONS)}")
        if "rates" not in entry.drift:
            raise NotCalibrated("these policies hold no rates to watch: run mexit calibrate")
        self._entry, self._share, self._action = entry, share, action
        self._random = random.Random(seed)
        self._tests: dict[int, DriftTest] = {}
        self._lock = threading.Lock()

    @property
    def alarms(self) -> tuple[int, ...]:
        """Places in the frontier whose test raised the alarm."""
        with self._lock:
            return tuple(sorted(place for place, test in self._tests.items() if test.alarm))

    def choose(self, place: int, reasons: Sequence[str]) -> NDArray[np.intp]:
        """Which rows of a batch to watch: some of those that left because they were sure."""
        if self._entry.drift["rates"][place] is None:
            return np.zeros(0, np.intp)
        with self._lock:
            chosen = [
                row
                for row, reason in enumerate(reasons)
                if reason == "confident" and self._random.random() < self._share
            ]
        return np.asarray(chosen, np.intp)

    def observe(self, place: int, disagreed: NDArray[np.bool_]) -> None:
        """What the full network said of the watched rows, (R,)."""
        with self._lock:
            test = self._tests.get(place)
            if test is None:
                rate, alpha = self._entry.drift["rates"][place], self._entry.drift["alpha"]
                test = self._tests[place] = DriftTest(rate, alpha)
            before = test.alarm
            for outcome in disagreed.tolist():
                test.observe(outcome)
            raised = test.alarm and not before
        if raised:
            _LOG.warning(
                "the data has changed: early answers differ from the full network's in %d of %d watched inputs, "
                "at most %.2f%% were expected%s",
                test.disagreements,
                test.observations,
                100 * test.p0,
                "; moving to a safer policy" if self._action == "safer" else "",
            )

    def safer(self, place: int) -> int:
        """The frontier place to use instead of `place`: another one only after an alarm there."""
        if self._action != "safer" or place not in self.alarms:
            return place
        certified = [found["first"] for found in self._entry.certificates if found["first"] > place]
        above = min(certified, default=len(self._entry.frontier) - 1)
        return above if above not in self.alarms else len(self._entry.frontier) - 1
