"""How sure an exit is: from logits to a score, the same one in calibration, evaluation and at run time.

A score is float64, larger means surer, and it never saturates: the softmax of an easy image is exactly 1.0
in float32, and such ties would break a budget. So the maximum probability is scored by its log-odds, and
everything is computed from log-probabilities. People are shown the probability.

A NaN anywhere in a row gives that row a NaN score, and `policy.should_exit` is never true of NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.errors import BadInput, UsageError

Floats = NDArray[np.float64]

MEASURES = ("max-probability", "margin", "entropy", "agreement")
SMALLEST_SUM = 1e-280  # of weights: a smaller one has lost digits to numbers too small for a float


@dataclass(frozen=True)
class State:
    """What a scorer carries from exit to exit for each row still under way; None what its scores do not build on.

    Attributes:
        log_total: log of the sum of the tempered softmax of the exits so far, (B, C); of an ensemble.
        predicted: the class of the last exit, (B,); -1 before the first. Of agreement, as the next one is.
        agreed: how many exits in a row have named that class, (B,).
    """

    log_total: Floats | None = None
    predicted: NDArray[np.int64] | None = None
    agreed: NDArray[np.int64] | None = None

    def take(self, rows: NDArray[np.intp]) -> State:
        """The given rows, in the given order."""
        return State(*(None if kept is None else kept[rows] for kept in self._kept))

    @staticmethod
    def concat(states: Sequence[State]) -> State:
        """Rows of several states of one scorer, one after the other."""
        columns = zip(*(state._kept for state in states), strict=True)
        return State(*(None if column[0] is None else np.concatenate(column) for column in columns))

    @property
    def _kept(self) -> tuple[NDArray[Any] | None, ...]:
        return self.log_total, self.predicted, self.agreed


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
        log_total = np.full((rows, self.classes), -np.inf) if self.ensemble else None
        if self.measure != "agreement":
            return State(log_total)
        return State(log_total, np.full(rows, -1, np.int64), np.zeros(rows, np.int64))

    def step(self, k: int, logits: NDArray[np.floating], state: State) -> tuple[State, Floats, Floats]:
        """Add exit `k` (from 1).

        Args:
            k: the exit.
            logits: (B, C), any float dtype.
            state: of the same B rows.

        Returns:
            The next state, probabilities (B, C) float64 and scores (B,) float64.
        """
        if logits.ndim != 2 or logits.shape[1] != self.classes:
            raise BadInput(f"exit {k} gave logits of shape {logits.shape}, expected (B, {self.classes})")
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            log_weights = np.divide(logits, self.temperatures[k - 1], dtype=np.float64)
            if state.log_total is not None:
                log_weights = np.logaddexp(state.log_total, _log_softmax(log_weights))
                state = replace(state, log_total=log_weights)
            shifted, weights = _weights(log_weights)
            total = weights.sum(axis=1, keepdims=True)
            if state.agreed is not None:
                log_answer = log_weights - np.log(k) if self.ensemble else shifted - np.log(total)
                predicted = log_answer.argmax(axis=1)  # ties after rounding as everywhere: the first
                agreed = np.where(predicted == state.predicted, state.agreed + 1, 1)
                state = replace(state, predicted=predicted, agreed=agreed)
            return state, weights / total, self._score(shifted, weights, state)

    def row_probabilities(self, logits: Sequence[NDArray[np.floating]]) -> Floats:
        """Probabilities (C,) of one row, its logits (1, C) at exits 1..k: those of `step`, to the last bit."""
        k = len(logits)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            if self.ensemble:
                pairs = zip(logits, self.temperatures, strict=False)
                each = [_log_softmax(np.divide(one, by, dtype=np.float64)) for one, by in pairs]
                log_weights = np.logaddexp.reduce(np.concatenate(each), axis=0, keepdims=True)
            else:
                log_weights = np.divide(logits[-1], self.temperatures[k - 1], dtype=np.float64)
            _, weights = _weights(log_weights)
            return np.asarray((weights / weights.sum(axis=1, keepdims=True))[0])

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
            state, probabilities, score = self.step(k, exit_logits, state)
            scores.append(score)
            predictions.append(probabilities.argmax(axis=1))
        return np.stack(scores), np.stack(predictions)

    def _score(self, shifted: Floats, weights: Floats, state: State) -> Floats:
        """From log-weights (B, C), the largest of every row 0, and their exponentials."""
        if self.measure == "margin":
            return np.asarray(shifted.max(axis=1) - np.partition(shifted, self.classes - 2, axis=1)[:, -2])
        top, others = shifted.argmax(axis=1), weights.copy()
        others[np.arange(len(others)), top] -= 1.0  # not = 0: NaN has to stay
        rest = others.sum(axis=1)
        if self.measure == "entropy":
            log_answer = shifted - np.log1p(rest)[:, None]
            return np.asarray(np.where(np.isneginf(log_answer), 0.0, np.exp(log_answer) * log_answer).sum(axis=1))
        log_rest = _log_sum_others(shifted, top) if (rest < SMALLEST_SUM).any() else np.log(rest)
        if state.agreed is None:
            return np.asarray(-log_rest)
        # Agreement counts exits; ties among equal counts are ranked by the probability, which adds less than 1.
        return np.asarray(state.agreed + 0.5 - np.arctan(log_rest) / np.pi)


def _weights(log_weights: Floats) -> tuple[Floats, Floats]:
    """Log-weights (B, C) shifted so that the largest of every row is 0, and their exponentials."""
    shifted = log_weights - log_weights.max(axis=1, keepdims=True)
    return shifted, np.exp(shifted)


def _log_softmax(logits: Floats) -> Floats:
    shifted, weights = _weights(logits)
    return np.asarray(shifted - np.log(weights.sum(axis=1, keepdims=True)))


def _log_sum_others(shifted: Floats, top: NDArray[np.int64]) -> Floats:
    """log of the summed weights of all classes but the top one, (B,), where these are too small to add."""
    others = shifted.copy()
    others[np.arange(len(others)), top] -= np.inf
    largest = others.max(axis=1)
    safe = np.where(np.isneginf(largest), 0.0, largest)
    return np.asarray(safe + np.log(np.exp(others - safe[:, None]).sum(axis=1)))
