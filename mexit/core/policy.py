"""THE decision: who leaves at which exit. Calibration, evaluation, engine and reference all call this.

A row leaves at the first exit whose score reaches that exit's threshold; the last exit takes the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mexit.core.scores import Floats, Scorer
from mexit.errors import UsageError

Thresholds = tuple[float | None, ...]


@dataclass(frozen=True)
class Policy:
    """A scorer and the thresholds that go with it.

    Attributes:
        measure: one of `confidence.MEASURES`.
        ensemble: exit k answers with the mean of exits 1..k.
        temperatures: one per exit, (E,).
        thresholds: one per exit but the last, (E-1,), in units of the score; None = never leave here.
    """

    measure: str
    ensemble: bool
    temperatures: tuple[float, ...]
    thresholds: Thresholds

    def __post_init__(self) -> None:
        if len(self.thresholds) != len(self.temperatures) - 1:
            raise UsageError(
                f"{len(self.temperatures)} exits need {len(self.temperatures) - 1} thresholds, "
                f"found {len(self.thresholds)}"
            )
        if not all(value is None or np.isfinite(value) for value in self.thresholds):
            raise UsageError(f"thresholds must be finite or None (never leave), found {self.thresholds}")

    def scorer(self, classes: int) -> Scorer:
        """The scorer for `classes` classes."""
        return Scorer(self.measure, self.ensemble, self.temperatures, classes)

    def without_early_exit(self) -> Policy:
        """The same scores, but every input runs to the last exit: the budget `full`."""
        return replace(self, thresholds=(None,) * len(self.thresholds))

    def evaluate_all_heads(self) -> Policy:
        """Every input runs to the last exit and every head on the way is asked: what rehearsals time."""
        return replace(self, thresholds=(float(np.finfo(np.float64).max),) * len(self.thresholds))

    @cached_property
    def asked(self) -> tuple[bool, ...]:
        """Whether each exit's head has a say, (E,); see `heads_asked`."""
        return heads_asked(self.measure, self.ensemble, self.thresholds)

    def threshold(self, k: int) -> float | None:
        """The threshold of exit `k` (from 1); the last exit is not asked."""
        return self.thresholds[k - 1]


def heads_asked(measure: str, ensemble: bool, thresholds: Thresholds) -> tuple[bool, ...]:
    """Whether each exit's head has a say, (E,): where nobody leaves, only if later exits build on its answer."""
    builds = ensemble or measure == "agreement"
    return (*(builds or threshold is not None for threshold in thresholds), True)


def should_exit(score: Floats, threshold: float | Floats | None) -> NDArray[np.bool_]:
    """Which rows leave: score (B,) against one threshold, or against each row's own (B,), where NaN is None.

    NaN is never sure, and nobody is where the threshold is None.
    """
    if threshold is None:
        return np.zeros(score.shape, np.bool_)
    return score >= threshold


def first_exit(scores: Floats, thresholds: Sequence[float | None]) -> NDArray[np.int64]:
    """The exit (from 1) that answers each sample: scores (E, N) or (E-1, N), thresholds (E-1,) to (N,)."""
    last = len(thresholds) + 1
    exits = np.full(scores.shape[1], last, np.int64)
    for k in range(last - 1, 0, -1):
        exits[should_exit(scores[k - 1], thresholds[k - 1])] = k
    return exits
