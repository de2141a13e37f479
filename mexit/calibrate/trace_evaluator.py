"""Cost and accuracy of thresholds on a trace."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from mexit.calibrate.clusters import Estimate, mean_with_error
from mexit.calibrate.geometric import Ranking
from mexit.core.cost import Costs, exit_counts
from mexit.core.exit_policy import Thresholds, first_exit
from mexit.core.policies_file import Outcome
from mexit.core.scores import Floats, Scorer
from mexit.core.trace import Trace
from mexit.errors import BadInput


@dataclass(frozen=True, eq=False)
class TraceEvaluator:
    """Evaluates thresholds: exits taken, predictions, accuracy and cost.

    Attributes:
        scores, predictions: of every exit and sample, (E, N).
        labels: (N,), or None.
        costs: of leaving at each exit, and of the static network.
        groups: group id of each sample, (N,), or None without groups.
        last_alone: predictions of the last exit without an ensemble, (N,); None where they are `predictions[-1]`.
    """

    scores: Floats
    predictions: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    costs: Costs
    groups: NDArray[np.int64] | None = None
    last_alone: NDArray[np.int64] | None = None

    @staticmethod
    def of(trace: Trace, scorer: Scorer, costs: Costs) -> TraceEvaluator:
        """Score a trace. Raises `BadInput` for another number of exits."""
        exits = len(costs.cumulative)
        if trace.logits.shape[0] != exits:
            raise BadInput(f"the trace has {trace.logits.shape[0]} exits, the model {exits}")
        last_alone = None
        if scorer.ensemble:
            last = Scorer(scorer.measure, False, scorer.temperatures[-1:], scorer.classes)
            last_alone = last.answer(trace.logits[-1:])[1][0]
        return TraceEvaluator(*scorer.answer(trace.logits), trace.labels, costs, trace.groups, last_alone)

    @cached_property
    def ranking(self) -> Ranking:
        """The scores, sorted."""
        return Ranking.of(self.scores)

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each exit classifies each sample correctly, (E, N); needs labels."""
        assert self.labels is not None
        return np.asarray(self.predictions == self.labels)

    @property
    def static(self) -> NDArray[np.int64]:
        """The classes that the static network predicts, (N,)."""
        return self.predictions[-1] if self.last_alone is None else self.last_alone

    def exits(self, thresholds: Thresholds) -> NDArray[np.int64]:
        """The exit that answers each sample, from 1, (N,)."""
        return first_exit(self.scores, thresholds)

    def answers(self, thresholds: Thresholds) -> NDArray[np.int64]:
        """The predicted class of each sample, (N,)."""
        if all(threshold is None for threshold in thresholds):
            return self.static
        exits = self.exits(thresholds)
        return self.predictions[exits - 1, np.arange(len(exits))]

    def hits(self, thresholds: Thresholds) -> NDArray[np.bool_]:
        """Whether each sample is classified correctly, (N,); needs labels."""
        return np.asarray(self.answers(thresholds) == self.labels)

    def spent(self, thresholds: Thresholds) -> Floats:
        """The cost of each sample in the unit of the costs, (N,)."""
        return np.asarray(self.costs.of_exits(thresholds), np.float64)[self.exits(thresholds) - 1]

    def accuracy(self, thresholds: Thresholds) -> Estimate | None:
        """Accuracy with its standard error; None without labels."""
        if self.labels is None:
            return None
        return mean_with_error(self.hits(thresholds).astype(np.float64), self.groups)

    def cost(self, thresholds: Thresholds) -> Estimate:
        """Mean cost in the unit of the costs, with its standard error."""
        return mean_with_error(self.spent(thresholds), self.groups)

    def outcome(self, thresholds: Thresholds) -> Outcome:
        """Mean cost, accuracy, their standard errors and exits taken."""
        exits = self.exits(thresholds)
        cost, accuracy = self.cost(thresholds), self.accuracy(thresholds)
        return Outcome(
            n=len(exits),
            mean_macs=cost.value,
            accuracy=None if accuracy is None else accuracy.value,
            exits=tuple(exit_counts(exits, len(self.costs.cumulative)).tolist()),
            macs_error=_finite(cost.stderr),
            accuracy_error=None if accuracy is None else _finite(accuracy.stderr),
            groups=cost.groups if self.groups is not None else None,
        )


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
