"""Drift detection: compares early answers with those of the full network, and raises an alarm if they differ too often.

A share of the rows that exited early also runs to the last exit. For each point of the frontier a sequential test
compares the rate of disagreement with the upper bound of that rate from calibration. An alarm is logged once, and can
move the runtime to a safer point of the frontier. The checks run in a background thread, after the answers were given.

The test is a betting martingale (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting",
JRSS B 2024). Its null hypothesis is that the rate is at most p0. A bet of fraction f multiplies its wealth by
1 + f (1 - p0) / p0 at a disagreement and by 1 - f at an agreement. Under the null hypothesis the wealth is a
supermartingale. By Ville's inequality the probability that it ever reaches 1/alpha is therefore at most alpha, however
often it is looked at. Several bets share the initial wealth of 1: large fractions find large shifts quickly, small
fractions find small ones. New bets start at regular intervals, because a long period without drift uses up the wealth
of the earlier bets.

The test counts pictures, not groups: the bound p0 is that of calibration, which counts groups, but every compared
picture is one observation. Where consecutive pictures are alike (a film), their disagreements come together, and false
alarms are more frequent than alpha.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mexit.core.policies_file import PolicyEntry
from mexit.errors import NotCalibrated, UsageError

ACTIONS = ("alarm", "safer")
BET_FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.4)  # 1 would lose everything at the first agreement
BET_INTERVAL = 250  # observations between two starts of new bets
MIN_RATE = 1e-4  # a tested rate of 0 would win without limit at the first disagreement
MAX_PENDING = 16  # checks that wait; under more load checks are dropped
_LOG = logging.getLogger("mexit.drift")


@dataclass
class DriftTest:
    """A sequential test of the hypothesis that the rate of disagreement is at most `p0`.

    Attributes:
        p0: the largest rate without drift, in [0, 1).
        alpha: the largest probability of a false alarm, in (0, 1).
        observations, disagreements: counts so far.
        alarm: whether the alarm was raised; it stays raised.
    """

    p0: float
    alpha: float = 0.01
    observations: int = 0
    disagreements: int = 0
    alarm: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.p0 < 1 or not 0 < self.alpha < 1:
            raise UsageError(f"a rate and an alarm level must lie in [0, 1), found {self.p0} and {self.alpha}")
        rate = max(self.p0, MIN_RATE)
        self._gains = [1 + fraction / rate * (1 - rate) for fraction in BET_FRACTIONS]
        self._wealth = [0.0] * len(BET_FRACTIONS)

    def observe(self, disagreed: bool) -> bool:
        """Add one observation; returns `alarm`."""
        if self.alarm:
            return True
        if self.observations % BET_INTERVAL == 0:
            self._start_bets()
        self.observations += 1
        self.disagreements += disagreed
        for i, fraction in enumerate(BET_FRACTIONS):
            self._wealth[i] *= self._gains[i] if disagreed else 1 - fraction
        self.alarm = sum(self._wealth) >= 1 / self.alpha
        return self.alarm

    def _start_bets(self) -> None:
        """The n-th start adds a wealth of 1 / (n (n + 1)); all of them add up to 1.

        Bets of the same fraction are multiplied by the same factors, so only the sum of their wealth is stored.
        """
        n = self.observations // BET_INTERVAL + 1
        for i in range(len(BET_FRACTIONS)):
            self._wealth[i] += 1 / (n * (n + 1) * len(BET_FRACTIONS))


class DriftWatch:
    """One drift test for each point of the frontier, and the thread that runs the checks. Thread-safe."""

    def __init__(
        self,
        entry: PolicyEntry,
        share: float,
        action: str = "alarm",
        seed: int | None = None,
        *,
        max_pending: int = MAX_PENDING,
    ) -> None:
        """Start without observations.

        Args:
            entry: the policies of the engine, with the rates of disagreement from calibration.
            share: share of the early answers that are compared, in (0, 1].
            action: "alarm" only logs; "safer" also moves to the cheapest certified point above, or to the full
                network without certificates.
            seed: of the choice of rows; None is unpredictable.
            max_pending: the most checks that run or wait.

        Raises:
            UsageError: the share or the action is not valid.
            NotCalibrated: the policies hold no rates.
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
        self._max_pending, self._dropped = max_pending, 0
        self._start_thread()

    @property
    def dropped(self) -> int:
        """Number of checks that did not run because too many were waiting."""
        with self._lock:
            return self._dropped

    def _start_thread(self) -> None:
        self._process = os.getpid()
        self._slots = threading.BoundedSemaphore(self._max_pending)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="mexit-drift")  # its thread starts with a check

    def submit(self, check: Callable[[], None]) -> None:
        """Run a check in the background thread; drop and count it if too many wait. Errors are logged."""
        if self._process != os.getpid():  # the thread does not survive a fork
            self._start_thread()
        if not self._slots.acquire(blocking=False):
            with self._lock:
                self._dropped += 1
            return
        try:
            self._executor.submit(self._run, check)
        except RuntimeError:  # the watch is closed
            self._slots.release()

    def join(self) -> None:
        """Wait until the submitted checks are done."""
        self._executor.submit(int).result()

    def close(self) -> None:
        """Cancel the checks that wait, and end the thread after the present check."""
        self._executor.shutdown(cancel_futures=True)

    def _run(self, check: Callable[[], None]) -> None:
        try:
            check()
        except Exception:
            _LOG.exception("a drift check failed")
        finally:
            self._slots.release()

    @property
    def totals(self) -> tuple[int, int]:
        """Answers that were compared, and how many of them differed, at all frontier points together."""
        with self._lock:
            tests = self._tests.values()
            return sum(test.observations for test in tests), sum(test.disagreements for test in tests)

    @property
    def alarms(self) -> tuple[int, ...]:
        """Indices of the frontier points whose test raised the alarm."""
        with self._lock:
            return tuple(sorted(index for index, test in self._tests.items() if test.alarm))

    def choose(self, frontier_index: int, reasons: Sequence[str]) -> NDArray[np.intp]:
        """Indices of the rows to compare: a random share of those that exited because they were confident."""
        if self._entry.drift["rates"][frontier_index] is None:
            return np.zeros(0, np.intp)
        with self._lock:
            chosen = [
                row
                for row, reason in enumerate(reasons)
                if reason == "confident" and self._random.random() < self._share
            ]
        return np.asarray(chosen, np.intp)

    def observe(self, frontier_index: int, disagreed: NDArray[np.bool_]) -> None:
        """Add observations: whether the full network disagreed with the early answer, bool (R,)."""
        with self._lock:
            test = self._tests.get(frontier_index)
            if test is None:
                rate, alpha = self._entry.drift["rates"][frontier_index], self._entry.drift["alpha"]
                test = self._tests[frontier_index] = DriftTest(rate, alpha)
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

    def safer(self, frontier_index: int) -> int:
        """The frontier point to use in place of `frontier_index`; another one only after an alarm there."""
        if self._action != "safer" or frontier_index not in self.alarms:
            return frontier_index
        certified = [one["first"] for one in self._entry.certificates if one["first"] > frontier_index]
        last = len(self._entry.frontier) - 1
        safer = min(certified, default=last)
        return safer if safer not in self.alarms else last
