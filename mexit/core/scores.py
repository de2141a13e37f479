"""Confidence scores of an exit, computed from its logits in numpy: the same in calibration, evaluation and runtime.

A score is float64; larger means more confident. Scores do not saturate: the float32 softmax of an easy image is
exactly 1.0, and such ties would make a threshold exceed its budget. Everything is therefore computed from
log-probabilities, and the maximum probability is scored by its log-odds. Predictions report the probability.

A NaN logit gives its row a NaN score, which reaches no threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.errors import BadInput, UsageError

Floats = NDArray[np.float64]

AGREEMENT = "agreement"  # the measure that needs the answers of earlier exits
MEASURES = ("max-probability", "margin", "entropy", AGREEMENT)
MAX_SCALAR_CLASSES = 200  # numpy is faster than `ScalarScorer` beyond
SMALLEST_SUM = 1e-280  # a smaller sum of weights has lost digits to subnormal numbers
# The estimate of `ScalarScorer` and the score of `Scorer` each have an error of about 1e-16 times
# (1000 + C + the largest tempered logit). This factor leaves four orders of magnitude to spare.
_ERROR = 1e-12


@dataclass(frozen=True)
class State:
    """What a scorer keeps of each row from exit to exit; None where the scores do not need it.

    Attributes:
        log_total: log of the sum of the tempered softmax of the exits so far, (B, C); of an ensemble.
        predicted: class of the last exit, (B,), -1 before exit 1; of agreement.
        agreed: number of successive exits that predicted that class, (B,); of agreement.
    """

    log_total: Floats | None = None
    predicted: NDArray[np.int64] | None = None
    agreed: NDArray[np.int64] | None = None

    def take(self, rows: NDArray[np.intp]) -> State:
        """The given rows, in the given order."""
        return State(*(None if array is None else array[rows] for array in self._arrays))

    @staticmethod
    def concat(states: Sequence[State]) -> State:
        """The rows of several states of one scorer, in order."""
        columns = zip(*(state._arrays for state in states), strict=True)
        return State(*(None if column[0] is None else np.concatenate(column) for column in columns))

    @property
    def _arrays(self) -> tuple[NDArray[Any] | None, ...]:
        return self.log_total, self.predicted, self.agreed


@dataclass(frozen=True)
class Scorer:
    """Logits of successive exits to probabilities and scores.

    With the tempered probabilities p of an exit and its predicted class c, the scores are

    - `max-probability`: log(p_c / (1 - p_c))
    - `margin`: log(p_c / p_d), with the second most probable class d
    - `entropy`: the negative entropy, sum of p log p
    - `agreement`: number of successive exits that predict c, plus a term in (0, 1) that rises with `max-probability`

    Attributes:
        measure: one of `MEASURES`.
        ensemble: whether exit k answers with the mean of the tempered softmax of exits 1..k instead of its own (the
            budgeted setting of MSDNet, Huang et al., ICLR 2018).
        temperatures: one per exit, (E,); logits are divided by them.
        classes: number of classes, C.
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
        if self.measure != AGREEMENT:
            return State(log_total)
        return State(log_total, np.full(rows, -1, np.int64), np.zeros(rows, np.int64))

    def step(self, k: int, logits: NDArray[np.floating], state: State) -> tuple[State, Floats, Floats]:
        """Add exit `k`.

        Args:
            k: the exit, from 1.
            logits: (B, C), any float dtype.
            state: the state of the same B rows after the exit before.

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
                predicted = log_answer.argmax(axis=1)  # the first class of a tie, as everywhere
                agreed = np.where(predicted == state.predicted, state.agreed + 1, 1)
                state = replace(state, predicted=predicted, agreed=agreed)
            return state, weights / total, self._score(shifted, weights, state)

    def row_probabilities(self, logits: Sequence[NDArray[np.floating]]) -> Floats:
        """Probabilities of one row, (C,), from its logits (1, C) at exits 1..k; bitwise equal to those of `step`."""
        k = len(logits)
        if self.ensemble:
            with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
                pairs = zip(logits, self.temperatures, strict=False)
                each = [_log_softmax(np.divide(one, by, dtype=np.float64)) for one, by in pairs]
                _, weights = _weights(np.logaddexp.reduce(np.concatenate(each), axis=0, keepdims=True))
                return np.asarray((weights / weights.sum(axis=1, keepdims=True))[0])
        log_weights = logits[-1][0].astype(np.float64) / self.temperatures[k - 1]
        top = log_weights[log_weights.argmax()]
        if not math.isfinite(top):  # only then the arithmetic below needs `errstate`
            return np.asarray(self.step(k, logits[-1], self.start(1))[1][0])
        weights = np.exp(log_weights - top)  # as in `step`; the methods `max` and `sum` would take twice as long
        return np.asarray(weights / np.add.reduce(weights))

    def score(self, logits: NDArray[np.floating]) -> Floats:
        """Scores of every exit on a data set: logits (E, N, C) to (E, N)."""
        return self.answer(logits)[0]

    def answer(self, logits: NDArray[np.floating]) -> tuple[Floats, NDArray[np.int64]]:
        """Scores (E, N) and predicted classes (E, N) of logits (E, N, C)."""
        return self.answer_exits(logits)[:2]

    def answer_exits(self, logits: NDArray[np.floating]) -> tuple[Floats, NDArray[np.int64], Floats]:
        """Scores, predicted classes and confidences of every exit on a data set.

        Args:
            logits: (E, N, C).

        Returns:
            (E, N) each; the confidence is the largest probability, 0 for NaN.

        Raises:
            BadInput: the logits have another shape.
        """
        if logits.ndim != 3 or logits.shape[0] != len(self.temperatures):
            raise BadInput(f"expected logits ({len(self.temperatures)}, N, C), found shape {logits.shape}")
        state = self.start(logits.shape[1])
        rows = []
        for k, exit_logits in enumerate(logits, start=1):
            state, probabilities, score = self.step(k, exit_logits, state)
            rows.append((score, probabilities.argmax(axis=1), np.nan_to_num(probabilities.max(axis=1))))
        scores, predictions, confidence = (np.stack(column) for column in zip(*rows, strict=True))
        return scores, predictions, confidence

    def _score(self, shifted: Floats, weights: Floats, state: State) -> Floats:
        """Scores from log-weights (B, C), whose largest in each row is 0, and their exponentials."""
        if self.measure == "margin":
            return np.asarray(shifted.max(axis=1) - np.partition(shifted, self.classes - 2, axis=1)[:, -2])
        top, others = shifted.argmax(axis=1), weights.copy()
        others[np.arange(len(others)), top] -= 1.0  # an assignment of 0 would remove a NaN
        rest = others.sum(axis=1)
        if self.measure == "entropy":
            log_answer = shifted - np.log1p(rest)[:, None]
            return np.asarray(np.where(np.isneginf(log_answer), 0.0, np.exp(log_answer) * log_answer).sum(axis=1))
        log_rest = _log_sum_others(shifted, top) if (rest < SMALLEST_SUM).any() else np.log(rest)
        if state.agreed is None:
            return np.asarray(-log_rest)
        return np.asarray(state.agreed + 0.5 - np.arctan(log_rest) / np.pi)


class ScalarScorer:
    """Exit decisions for one row, without the cost of numpy calls, which rivals that of a small segment.

    Python floats estimate the score of `Scorer`, with a bounded error. If the threshold lies within the error, or a
    number is not finite, `Scorer.step` computes the score. Decisions and probabilities are therefore those of
    `Scorer`, to the last bit.

    Call `add` for each exit in order, and then `reaches`.

    Attributes:
        exact: whether some decision needed `Scorer.step`.
    """

    def __init__(self, scorer: Scorer) -> None:
        """A row before exit 1."""
        self.exact = False
        self._scorer = scorer
        self._logits: list[NDArray[np.floating]] = []
        self._weighed, self._estimated = 0, math.nan
        self._weights: list[float] = []
        self._error = math.nan if scorer.classes > MAX_SCALAR_CLASSES else 0.0
        self._predicted, self._agreed = -1, 0
        self._stepped = 0
        self._step: tuple[State, Floats, Floats] | None = None

    def add(self, logits: NDArray[np.floating]) -> None:
        """Add the next exit.

        Args:
            logits: (1, C), any float dtype; they must not change until the row has its answer.

        Raises:
            BadInput: the logits have another shape.
        """
        expected = (1, self._scorer.classes)
        if logits.shape != expected:
            raise BadInput(f"exit {len(self._logits) + 1} gave logits of shape {logits.shape}, expected {expected}")
        self._logits.append(logits)

    def reaches(self, threshold: float | None) -> bool:
        """Whether the score of the exit just added is at least `threshold`; false for None."""
        if threshold is None:
            return False
        score = self._estimate()
        if abs(score - threshold) > self._error:  # false if either is NaN
            return score > threshold
        return bool(self._exact_step()[2][0] >= threshold)

    def probabilities(self) -> Floats:
        """Probabilities of the exit just added, (C,)."""
        if not self.exact:
            return self._scorer.row_probabilities(self._logits)
        probabilities: Floats = self._exact_step()[1][0]
        return probabilities

    def _exact_step(self) -> tuple[State, Floats, Floats]:
        """State, probabilities and score by `Scorer.step`, over the exits that it has not scored yet."""
        self.exact = True
        step = self._step or (self._scorer.start(1), np.zeros((1, self._scorer.classes)), np.zeros(1))
        for k in range(self._stepped + 1, len(self._logits) + 1):
            step = self._scorer.step(k, self._logits[k - 1], step[0])
        self._stepped, self._step = len(self._logits), step
        return step

    def _estimate(self) -> float:
        """The score to within `_error`. One of the two is NaN if the bound cannot be guaranteed."""
        if self._weighed == len(self._logits):
            return self._estimated
        score = math.nan
        agreement = self._scorer.measure == AGREEMENT
        first = self._weighed + 1 if agreement or self._scorer.ensemble else len(self._logits)
        for k in range(first, len(self._logits) + 1):
            if math.isnan(self._error):
                break
            self._weigh(k)
            if agreement or k == len(self._logits):
                score = self._score()
        self._weighed, self._estimated = len(self._logits), score
        return score

    def _weigh(self, k: int) -> None:
        """Set `_weights` to numbers proportional to the probabilities of exit `k`."""
        logits, temperature = self._logits[k - 1][0].tolist(), self._scorer.temperatures[k - 1]
        top = max(logits)
        weights = [math.exp((value - top) / temperature) for value in logits]
        total = sum(weights)
        if not 1.0 <= total < math.inf:  # NaN or infinite logits
            self._error = math.nan
            return
        self._error = max(self._error, _ERROR * (1000 + abs(top) / temperature))
        if self._scorer.ensemble:
            own = [weight / total for weight in weights]
            weights = [x + y for x, y in zip(self._weights, own, strict=True)] if self._weights else own
        self._weights = weights

    def _score(self) -> float:
        """The formulas of `Scorer`, from `_weights`."""
        weights, measure = self._weights, self._scorer.measure
        if math.isnan(self._error):
            return math.nan
        top = max(weights)
        if measure == "entropy":
            total = sum(weights)
            return sum(w * math.log(w) for w in weights if w > 0) / total - math.log(total)
        predicted = weights.index(top)
        weights[predicted] = 0.0
        second, others = max(weights), sum(weights)
        weights[predicted] = top
        if second < SMALLEST_SUM:
            self._error = math.nan
            return math.nan
        if measure == "margin":
            return math.log(top / second)
        log_odds = math.log(top / others)
        if measure == "max-probability":
            return log_odds
        if top - second <= self._error * top:  # `Scorer` may predict the other class
            self._error = math.nan
        self._agreed = self._agreed + 1 if predicted == self._predicted else 1
        self._predicted = predicted
        return self._agreed + 0.5 + math.atan(log_odds) / math.pi


def _weights(log_weights: Floats) -> tuple[Floats, Floats]:
    """Log-weights (B, C), shifted so that the largest of each row is 0, and their exponentials."""
    shifted = log_weights - log_weights.max(axis=1, keepdims=True)
    return shifted, np.exp(shifted)


def _log_softmax(logits: Floats) -> Floats:
    shifted, weights = _weights(logits)
    return np.asarray(shifted - np.log(weights.sum(axis=1, keepdims=True)))


def _log_sum_others(shifted: Floats, top: NDArray[np.int64]) -> Floats:
    """log of the summed weights of all classes but the top one, (B,), where the weights are too small to add."""
    others = shifted.copy()
    others[np.arange(len(others)), top] -= np.inf
    largest = others.max(axis=1)
    safe = np.where(np.isneginf(largest), 0.0, largest)
    return np.asarray(safe + np.log(np.exp(others - safe[:, None]).sum(axis=1)))
