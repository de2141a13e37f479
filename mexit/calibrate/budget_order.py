"""Selects thresholds for rising budgets so that neither cost nor accuracy falls from a budget to a larger one.

Among all choices in this order, the one of the largest total of accuracy + price x cost / static cost is taken. The
price is two standard errors of the accuracy: differences within the noise of the calibration data do not keep a budget
from being used, larger ones do. Choices that are more accurate than the static network, but not clearly, are avoided,
so that the static network is in order too; where early exits are clearly more accurate, it is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mexit.calibrate.threshold_search import STANDARD_ERRORS, ThresholdResult, clearly_better
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.exit_policy import Thresholds

TOLERANCE = 1 + 1e-9  # of a budget, for rounded costs
_MAX_ERROR = 0.5  # of an accuracy; the standard error of a single group is infinite


def select_in_order(
    evaluator: TraceEvaluator,
    budgets: Sequence[float],
    candidates: Sequence[ThresholdResult],
    searched: Sequence[ThresholdResult],
) -> list[Thresholds]:
    """Thresholds for budgets: those of candidates, or of the search where they are clearly better.

    Args:
        evaluator: of the calibration trace, with labels.
        budgets: rising, in the unit of the costs; the cheapest candidate fits the first.
        candidates: by rising cost; the last is the static network.
        searched: by rising cost and accuracy, none costlier than the static network; may be empty.
    """
    full = candidates[-1]
    rivals = [result for result in searched if not _just_above(evaluator, result, full)]
    chosen: list[ThresholdResult] = []
    for budget, candidate in zip(budgets, _best_chain(evaluator, budgets, candidates), strict=True):
        choice, lowest = candidate, chosen[-1] if chosen else candidate
        best = next((result for result in reversed(rivals) if result.cost <= budget * TOLERANCE), lowest)
        if clearly_better(evaluator, best.thresholds, candidate.thresholds) or candidate.accuracy < lowest.accuracy:
            choice = max(best, lowest, key=lambda result: result.accuracy)
        # The choice is at least as accurate as all earlier ones: those that cost more are replaced.
        cheaper = [result for result in chosen if result.cost <= choice.cost]
        chosen = cheaper + [choice] * (len(chosen) - len(cheaper) + 1)
    return [result.thresholds for result in chosen]


def _best_chain(
    evaluator: TraceEvaluator, budgets: Sequence[float], candidates: Sequence[ThresholdResult]
) -> list[ThresholdResult]:
    """One candidate per budget, in order: dynamic programming over budgets and candidates."""
    full = candidates[-1]
    costs = np.array([result.cost for result in candidates])
    accuracy = np.array([result.accuracy for result in candidates])
    estimate = evaluator.accuracy(full.thresholds)
    assert estimate is not None
    values = accuracy + STANDARD_ERRORS * min(estimate.stderr, _MAX_ERROR) * costs / full.cost
    values -= np.array([2.0 * _just_above(evaluator, result, full) for result in candidates])  # worse than any sum
    follows = np.triu(accuracy[:, None] <= accuracy[None, :])  # [j, k]: k may follow j, which costs no more
    totals = np.where(costs <= budgets[0] * TOLERANCE, values, -np.inf)
    steps: list[NDArray[np.intp]] = []
    for budget in budgets[1:]:
        reached = np.where(follows, totals[:, None], -np.inf)
        steps.append(reached.argmax(0))
        totals = np.where(costs <= budget * TOLERANCE, reached.max(0) + values, -np.inf)
    chain = [int(totals.argmax())]
    for step in reversed(steps):
        chain.append(int(step[chain[-1]]))
    return [candidates[k] for k in reversed(chain)]


def _just_above(evaluator: TraceEvaluator, result: ThresholdResult, full: ThresholdResult) -> bool:
    """Whether a result is more accurate than the static network, but not clearly."""
    above = result.accuracy > full.accuracy
    return above and not clearly_better(evaluator, result.thresholds, full.thresholds)
