"""The exit policy: decides at which exit a row leaves. Calibration, evaluation, engine and reference all use it.

A row leaves at the first exit whose score reaches the threshold of that exit, and otherwise at the last exit. With a
reject option, an answer that reached no threshold is unsure if its score is below the reject threshold of its exit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mexit.core.scores import AGREEMENT, Floats, Scorer
from mexit.errors import UsageError

Thresholds = tuple[float | None, ...]
LOWEST, HIGHEST = float(np.finfo(np.float64).min), float(np.finfo(np.float64).max)  # thresholds that JSON can hold


@dataclass(frozen=True)
class Policy:
    """Scores and thresholds.

    Attributes:
        measure: one of `scores.MEASURES`.
        ensemble: whether exit k answers with the mean of exits 1..k.
        temperatures: one per exit, (E,).
        thresholds: one per exit but the last, (E-1,), in units of the score; None means that no row leaves there.
        reject: one per exit, (E,), in units of the score; an answer of exit k that did not reach `thresholds[k - 1]` is
            unsure below `reject[k - 1]`, and so is every answer of an exit that no row passes (threshold `LOWEST`).
            None, for one exit or for all: it is never unsure.
    """

    measure: str
    ensemble: bool
    temperatures: tuple[float, ...]
    thresholds: Thresholds
    reject: Thresholds | None = None

    def __post_init__(self) -> None:
        if len(self.thresholds) != len(self.temperatures) - 1:
            raise UsageError(
                f"{len(self.temperatures)} exits need {len(self.temperatures) - 1} thresholds, "
                f"found {len(self.thresholds)}"
            )
        if self.reject is not None and len(self.reject) != len(self.temperatures):
            raise UsageError(
                f"{len(self.temperatures)} exits need {len(self.temperatures)} reject thresholds, "
                f"found {len(self.reject)}"
            )
        if not all(value is None or np.isfinite(value) for value in (*self.thresholds, *(self.reject or ()))):
            raise UsageError(f"thresholds must be finite or None, found {self.thresholds} and {self.reject}")

    def scorer(self, classes: int) -> Scorer:
        """The scorer for `classes` classes."""
        if classes not in self._scorers:
            self._scorers[classes] = Scorer(self.measure, self.ensemble, self.temperatures, classes)
        return self._scorers[classes]

    def without_early_exit(self) -> Policy:
        """The same scores, but every row runs to the last exit, as for the budget `full`."""
        return replace(self, thresholds=(None,) * len(self.thresholds))

    def evaluate_all_heads(self) -> Policy:
        """Every row runs to the last exit, and the score of every exit is computed, as a latency profile needs it."""
        return replace(self, thresholds=(HIGHEST,) * len(self.thresholds), reject=None)

    @cached_property
    def static(self) -> Policy | None:
        """The same policy for the static network, whose only exit is the last one; None if other exits are needed.

        They are needed for a threshold, and for a reject score that depends on the logits of earlier exits.
        """
        needed = self.reject is not None and (self.ensemble or self.measure == AGREEMENT)
        if needed or any(threshold is not None for threshold in self.thresholds):
            return None
        reject = None if self.reject is None else self.reject[-1:]
        return Policy(self.measure, False, self.temperatures[-1:], (), reject)

    @property
    def alone(self) -> Policy:
        """The same policy, without an ensemble if it is one of the static network, whose last exit answers alone."""
        return self if self.static is None else replace(self, ensemble=False)

    def threshold(self, k: int) -> float | None:
        """The threshold of exit `k`, from 1; the last exit has none."""
        return self.thresholds[k - 1]

    def unsure(
        self, exits: NDArray[np.int64], scores: Floats, confident: NDArray[np.bool_]
    ) -> NDArray[np.bool_] | None:
        """Which answers are unsure, (B,); None without a reject option.

        Args:
            exits: the exit of each answer, from 1, (B,).
            scores: the score of that exit, (B,). NaN reaches no threshold.
            confident: whether it reached the threshold of that exit, (B,).
        """
        if self.reject is None:
            return None
        sure = confident & np.array(self.selective)[exits - 1]
        return np.asarray(~sure & ~should_exit(scores, self.reject_thresholds[exits - 1]))

    @cached_property
    def selective(self) -> tuple[bool, ...]:
        """Whether reaching the threshold of each exit means confidence, (E,).

        It does not at the last exit, nor at one whose threshold is the lowest float, where every row leaves.
        """
        return (*(value is not None and value > LOWEST for value in self.thresholds), False)

    @cached_property
    def reject_thresholds(self) -> Floats:
        """`reject` as float64, (E,), with the lowest float in place of None."""
        reject = self.reject or (None,) * len(self.temperatures)
        return np.array([LOWEST if value is None else value for value in reject])

    @cached_property
    def _scorers(self) -> dict[int, Scorer]:
        """Scorers by number of classes: making one takes longer than scoring a row."""
        return {}


def should_exit(score: Floats, threshold: float | Floats | None) -> NDArray[np.bool_]:
    """Which rows leave at an exit, (B,).

    Args:
        score: (B,) float64. NaN reaches no threshold.
        threshold: of all rows, or one per row, (B,), where NaN stands for None: no row leaves.
    """
    if threshold is None:
        return np.zeros(score.shape, np.bool_)
    return score >= threshold


def first_exit(scores: Floats, thresholds: Sequence[float | None]) -> NDArray[np.int64]:
    """The exit of each sample, from 1: scores (E, N) or (E-1, N) and thresholds (E-1,) to (N,)."""
    last = len(thresholds) + 1
    exits = np.full(scores.shape[1], last, np.int64)
    for k in range(last - 1, 0, -1):
        exits[should_exit(scores[k - 1], thresholds[k - 1])] = k
    return exits
