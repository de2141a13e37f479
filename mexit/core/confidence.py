"""How sure an exit is: from logits to a score, the same one in calibration, evaluation and at run time.

A score is float64, larger means surer, and it never saturates: the softmax of an easy image is exactly 1.0
in float32, and such ties would break a budget. So the maximum probability is scored by its log-odds, and
everything is computed from log-probabilities. People are shown the probability.

A NaN anywhere in a row gives that row a NaN score, and `policy.is_sure` is never true of NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mexit.errors import BadInput, UsageError

Floats = NDArray[np.float64]

MEASURES = ("max-probability", "margin", "entropy", "agreement")


@dataclass(frozen=True)
class State:
    """What a scorer carries from exit to exit for each row still under way.

    Attributes:
        log_total: log of the sum of the tempered softmax of the exits so far, (B, C).
        exits: how many exits were added up, (B,).
        predicted: the class of the last exit, (B,); -1 before the first.
        agreed: how many exits in a row have named that class, (B,).
    """

    log_total: Floats
    exits: NDArray[np.int64]
    predicted: NDArray[np.int64]
    agreed: NDArray[np.int64]

    def take(self, rows: NDArray[np.intp]) -> State:
        """The given rows, in the given order."""
        return State(self.log_total[rows], self.exits[rows], self.predicted[rows], self.agreed[rows])

    @staticmethod
    def concat(states: Sequence[State]) -> State:
        """Rows of several states, one after the other."""
        return State(
            np.concatenate([state.log_total for state in states]),
            np.concatenate([state.exits for state in states]),
            np.concatenate([state.predicted for state in states]),
            np.concatenate([state.agreed for state in states]),
        )


@dataclass(frozen=True)
class Scorer:
    """Logits of successive exits to probabilities and scores.

    Attributes:
        measure: one of `MEASURES`.
        ensemble: whether exit k answers with the mean of the tempered softmax of exits 1..k
            (MSDNet's and NEO-KD's budgeted setting) instead of its own.
        temperatures: one per exit, (E,); logits are divided by them.
        classes: C.
    """

    measure: str
    ensemble: bool
    temperatures: tuple[float, ...]
    classes: int

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise UsageError(f"unknown confidence measure '{self.measure}': choose from {', '.join(MEASURES)}")
        if self.classes < 2:
            raise UsageError(f"a classifier needs at least 2 classes, found {self.classes}")
        if not all(np.isfinite(value) and value > 0 for value in self.temperatures):
            raise UsageError(f"temperatures must be positive and finite, found {self.temperatures}")

    def start(self, rows: int) -> State:
        """The state before exit 1 for a batch of `rows`."""
        return State(
            np.full((rows, self.classes), -np.inf),
            np.zeros(rows, np.int64),
            np.full(rows, -1, np.int64),
            np.zeros(rows, np.int64),
        )

    def step(self, k: int, logits: NDArray[np.floating], state: State) -> tuple[State, Floats, Floats]:
        """Add exit `k` (from 1).

        Args:
            k: the exit.
            logits: (B, C), any float dtype.
            state: of the same B rows.

        Returns:
            The next state, probabilities (B, C) float64 and scores (B,) float64.
        """
        if logits.shape != state.log_total.shape:
            raise BadInput(f"exit {k} gave logits of shape {logits.shape}, expected {state.log_total.shape}")
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            log_exit = self._tempered(k, logits)
            log_total = np.logaddexp(state.log_total, log_exit)
            exits = state.exits + 1
            log_answer = log_total - np.log(exits)[:, None] if self.ensemble else log_exit
            predicted = np.argmax(log_answer, axis=1).astype(np.int64)
            agreed = np.where(predicted == state.predicted, state.agreed + 1, 1)
            score = self._score(log_answer, agreed)
        return State(log_total, exits, predicted, agreed), np.exp(log_answer), score

    def row_probabilities(self, logits: Sequence[NDArray[np.floating]]) -> Floats:
        """Probabilities (C,) of one row, its logits (1, C) at exits 1..k: those of `step`, to the last bit."""
        k = len(logits)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            if not self.ensemble:
                log_answer = self._tempered(k, logits[-1])
            else:
                each = [self._tempered(place, values) for place, values in enumerate(logits, start=1)]
                log_answer = np.logaddexp.reduce(np.concatenate(each), axis=0, keepdims=True) - np.log(k)
            return np.asarray(np.exp(log_answer)[0])

    def score(self, logits: NDArray[np.floating]) -> Floats:
        """Scores of every exit on a whole data set: logits (E, N, C) to (E, N)."""
        return self.answer(logits)[0]

    def answer(self, logits: NDArray[np.floating]) -> tuple[Floats, NDArray[np.int64]]:
        """Scores (E, N) and predicted classes (E, N) of logits (E, N, C), by folding `step`."""
        if logits.ndim != 3 or logits.shape[0] != len(self.temperatures):
            raise BadInput(f"expected logits ({len(self.temperatures)}, N, C), found shape {logits.shape}")
        state = self.start(logits.shape[1])
        scores, predictions = [], []
        for k, exit_logits in enumerate(logits, start=1):
            state, _, score = self.step(k, exit_logits, state)
            scores.append(score)
            predictions.append(state.predicted)
        return np.stack(scores), np.stack(predictions)

    def _tempered(self, k: int, logits: NDArray[np.floating]) -> Floats:
        return _log_softmax(logits.astype(np.float64) / self.temperatures[k - 1])

    def _score(self, log_answer: Floats, agreed: NDArray[np.int64]) -> Floats:
        if self.measure == "entropy":
            terms = np.where(np.isneginf(log_answer), 0.0, np.exp(log_answer) * log_answer)
            return np.asarray(terms.sum(axis=1))
        top_two = np.partition(log_answer, self.classes - 2, axis=1)[:, -2:]
        if self.measure == "margin":
            return np.asarray(top_two[:, 1] - top_two[:, 0])
        log_odds = top_two[:, 1] - _log_sum_others(log_answer)
        if self.measure == "max-probability":
            return log_odds
        # Agreement counts exits; ties among equal counts are ranked by the probability, which adds less than 1.
        return agreed + 0.5 + np.arctan(log_odds) / np.pi


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _log_sum_others(log_answer: Floats) -> Floats:
    """log of the summed probability of all classes but the most probable one, (B,)."""
    others = log_answer.copy()
    others[np.arange(len(others)), np.argmax(log_answer, axis=1)] = -np.inf
    top = others.max(axis=1)
    safe_top = np.where(np.isneginf(top), 0.0, top)
    return np.asarray(safe_top + np.log(np.exp(others - safe_top[:, None]).sum(axis=1)))
