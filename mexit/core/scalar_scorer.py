"""The decision for one row, without numpy's cost per call: at batch 1 it rivals that of a small segment.

Plain floats estimate the score with a bounded error. Where the threshold lies within that error, or a number is
not finite, the plain path decides: `Scorer.step` and `policy.should_exit`. So every decision is the plain path's, and
the probabilities of the exit that answers equal its own to the last bit. A property test holds both.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mexit.core.policy import Policy, should_exit
from mexit.core.scores import SMALLEST_SUM, Floats, Scorer, State
from mexit.errors import BadInput

MOST_CLASSES = 200  # numpy is faster beyond
# Estimate and plain path each err by some 1e-16 times (1000 + C + the largest tempered logit). Four orders of
# magnitude are to spare, and still only a score within about 1e-9 of its threshold takes the plain path.
_ERROR = 1e-12
_NOT_ASKED = np.zeros((1, 0), np.float32)


class ScalarScorer:
    """One row on its way: `add` the logits of exit 1, ask whether it is `sure`, add those of exit 2, and so on."""

    def __init__(self, policy: Policy, classes: int) -> None:
        self._policy, self._classes = policy, classes
        self._logits: list[NDArray[np.floating]] = []
        self._plain: _PlainPath | None = None
        self._weighed = 0
        self._weights: list[float] = []
        self._error = math.nan if classes > MOST_CLASSES else 0.0
        self._predicted, self._agreed = -1, 0

    def add(self, logits: NDArray[np.floating]) -> None:
        """The next exit's logits (1, C), any float dtype; they must stay as they are until the row has its answer.

        Raises:
            BadInput: another shape.
        """
        if logits.shape != (1, self._classes):
            raise BadInput(
                f"exit {len(self._logits) + 1} gave logits of shape {logits.shape}, expected {(1, self._classes)}"
            )
        self._logits.append(logits)

    def skip(self) -> None:
        """The next exit's head did not run, since the policy does not ask it."""
        self._logits.append(_NOT_ASKED)

    def sure(self) -> bool:
        """Whether the row leaves at the exit just added, which is not the last one."""
        threshold = self._policy.thresholds[len(self._logits) - 1]
        if threshold is None:
            return False
        score = self._estimate()
        if abs(score - threshold) > self._error:  # never true of NaN
            return score > threshold
        return bool(should_exit(self._plainly().score, threshold)[0])

    def probabilities(self) -> Floats:
        """With which the exit just added answers, (C,)."""
        if self._plain is not None:
            probabilities: Floats = self._plainly().probabilities[0]
            return probabilities
        return _scorer(self._policy, self._classes).row_probabilities(self._logits)

    def _plainly(self) -> _PlainPath:
        if self._plain is None:
            self._plain = _PlainPath(_scorer(self._policy, self._classes))
        self._plain.go_on(self._logits)
        return self._plain

    def _estimate(self) -> float:
        """The score to within `_error`; one of them is NaN where that cannot be promised."""
        score = math.nan
        counts = self._policy.measure == "agreement"
        first = self._weighed + 1 if counts or self._policy.ensemble else len(self._logits)
        for k in range(first, len(self._logits) + 1):
            if math.isnan(self._error):
                break
            self._weigh(k)
            if counts or k == len(self._logits):
                score = self._score()
        self._weighed = len(self._logits)
        return score

    def _weigh(self, k: int) -> None:
        """Set `_weights` to numbers in proportion to the probabilities with which exit `k` answers."""
        logits, temperature = self._logits[k - 1][0].tolist(), self._policy.temperatures[k - 1]
        top = max(logits)
        weights = [math.exp((value - top) / temperature) for value in logits]
        total = sum(weights)
        if not 1.0 <= total < math.inf:  # NaN and infinite logits end here
            self._error = math.nan
            return
        self._error = max(self._error, _ERROR * (1000 + abs(top) / temperature))
        if self._policy.ensemble:
            alone = [weight / total for weight in weights]
            weights = [x + y for x, y in zip(self._weights, alone, strict=True)] if self._weights else alone
        self._weights = weights

    def _score(self) -> float:
        """By the formulas of `Scorer`, from `_weights`."""
        weights, measure = self._weights, self._policy.measure
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
        if top - second <= self._error * top:  # the plain path may name the other class
            self._error = math.nan
        self._agreed = self._agreed + 1 if predicted == self._predicted else 1
        self._predicted = predicted
        return self._agreed + 0.5 + math.atan(log_odds) / math.pi


class _PlainPath:
    """`Scorer.step` over the exits of one row; `score` (1,) and `probabilities` (1, C) are those of the last."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer, self._exits = scorer, 0
        self._state: State = scorer.start(1)
        self.score: Floats = np.zeros(1)
        self.probabilities: Floats = np.zeros((1, scorer.classes))

    def go_on(self, logits: list[NDArray[np.floating]]) -> None:
        """Up to the last of these exits; those that it has seen are not looked at again."""
        for k in range(self._exits + 1, len(logits) + 1):
            if logits[k - 1] is not _NOT_ASKED:
                self._state, self.probabilities, self.score = self._scorer.step(k, logits[k - 1], self._state)
        self._exits = len(logits)


@lru_cache(maxsize=64)
def _scorer(policy: Policy, classes: int) -> Scorer:
    return policy.scorer(classes)
