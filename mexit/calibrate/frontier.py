"""The frontier: thresholds for evenly spaced budgets, with their cost and accuracy on held-out data.

geometric   MSDNet's protocol: for each budget the q with the largest cost within it
search      thresholds of equal cost and higher accuracy, where the calibration data shows a clear difference (see
            `threshold_search`)

On the data that selects the thresholds, a larger budget is never cheaper nor less accurate than a smaller one. Budgets
between which no policy is more accurate get the same thresholds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cache, partial
from operator import itemgetter

import numpy as np

from mexit.calibrate.geometric import geometric
from mexit.calibrate.threshold_search import ThresholdResult, clearly_better, measure_thresholds, search_thresholds
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.budget import NAMED_FRACTIONS, Budget, format_macs
from mexit.core.exit_policy import Thresholds
from mexit.core.policies_file import FrontierPoint
from mexit.errors import BadInput, BudgetInfeasible, UsageError

POINTS = 41  # every 2.5 % between the costs of exit 1 and the last exit, so the named budgets are among them
RATIOS = np.concatenate([[0.0], np.geomspace(1e-3, 1e3, 481), [np.inf]])
MIN_SAMPLES = 20
TOLERANCE = 1 + 1e-9  # of a budget, for rounded costs
POLICIES = ("search", "geometric")


def frontier(
    calibration: TraceEvaluator,
    held_out: TraceEvaluator | None,
    attacked: TraceEvaluator | None,
    budgets: Mapping[str, Budget],
    policy: str = "geometric",
) -> tuple[tuple[FrontierPoint, ...], dict[str, int]]:
    """Select thresholds for a range of budgets.

    Args:
        calibration: selects the thresholds.
        held_out: measures their cost and accuracy; selects nothing.
        attacked: measures them on attacked samples; selects nothing.
        budgets: further budgets by name; the named ones of `core.budget` are always included.
        policy: one of `POLICIES`.

    Returns:
        The points by rising budget, and the index of each named budget.

    Raises:
        UsageError: unknown policy.
        BadInput: fewer than `MIN_SAMPLES` samples.
        BudgetInfeasible: a budget below the cheapest policy; the message names the nearest feasible budget.
    """
    if policy not in POLICIES:
        raise UsageError(f"unknown policy '{policy}': choose from {', '.join(POLICIES)}")
    costs = calibration.costs.cumulative
    named = {name: Budget.parse(name).macs(costs) for name in NAMED_FRACTIONS}
    named |= {name: budget.macs(costs) for name, budget in budgets.items()}
    all_macs = sorted({*np.linspace(costs[0], costs[-1], POINTS).tolist(), *named.values()})
    points = [
        FrontierPoint(
            budget_macs=macs,
            thresholds=thresholds,
            calibration=calibration.outcome(thresholds),
            held_out=held_out.outcome(thresholds) if held_out else None,
            attacked=attacked.outcome(thresholds) if attacked else None,
        )
        for macs, thresholds in zip(all_macs, _select(calibration, all_macs, policy), strict=True)
    ]
    return tuple(points), {name: all_macs.index(macs) for name, macs in named.items()}


def geometric_candidates(evaluator: TraceEvaluator) -> list[tuple[float, Thresholds]]:
    """Mean cost in MACs and geometric thresholds for every q of `RATIOS`, by rising cost."""
    if evaluator.scores.shape[1] < MIN_SAMPLES:
        raise BadInput(
            f"{evaluator.scores.shape[1]} samples are too few to set thresholds: at least {MIN_SAMPLES} are needed"
        )
    distinct = {geometric(evaluator.ranking, float(q)) for q in RATIOS}
    costed = [(float(evaluator.macs(thresholds).mean()), thresholds) for thresholds in distinct]
    return sorted(costed, key=lambda candidate: (candidate[0], str(candidate[1])))


def _select(evaluator: TraceEvaluator, budgets: Sequence[float], policy: str) -> list[Thresholds]:
    """Thresholds for budgets in MACs; `search` replaces geometric ones that it clearly improves.

    Neither cost nor accuracy on the trace falls from a budget to a larger one. Exception: budgets of the full cost and
    more never exit early, even where that is less accurate.
    """
    full: Thresholds = (None,) * (len(evaluator.costs.cumulative) - 1)
    full_macs = evaluator.costs.under([False] * len(full))[-1]
    candidates = [candidate for candidate in geometric_candidates(evaluator) if candidate[0] < full_macs]
    candidates.append((full_macs, full))
    below = [macs for macs in budgets if macs < evaluator.costs.cumulative[-1]]
    if evaluator.labels is None:
        selected = [_within(candidates, macs)[-1][1] for macs in below]
    else:
        found = search_thresholds(evaluator) if policy == "search" else []
        searched = [result for result in found if result.macs <= full_macs]
        selected = [result.thresholds for result in _select_in_order(evaluator, below, candidates, searched)]
    return selected + [full] * (len(budgets) - len(below))


def _select_in_order(
    evaluator: TraceEvaluator,
    budgets: Sequence[float],
    candidates: Sequence[tuple[float, Thresholds]],
    searched: Sequence[ThresholdResult],
) -> list[ThresholdResult]:
    """One result per budget, by rising cost and accuracy.

    Args:
        evaluator: with labels.
        budgets: rising, in MACs.
        candidates: mean cost in MACs and geometric thresholds, by rising cost.
        searched: results of the search, by rising cost and accuracy; may be empty.
    """
    measure = cache(partial(measure_thresholds, evaluator))
    chosen: list[ThresholdResult] = []
    for macs in budgets:
        lowest = chosen[-1].accuracy if chosen else 0.0
        costliest_first = (measure(thresholds) for _, thresholds in reversed(_within(candidates, macs)))
        choice = next((result for result in costliest_first if result.accuracy >= lowest), None) or chosen[-1]
        rivals = [result.thresholds for result in searched if result.macs <= macs * TOLERANCE]
        if rivals and clearly_better(evaluator, rivals[-1], choice.thresholds):
            choice = measure(rivals[-1])
        # The choice is at least as accurate as all earlier ones: those that cost more are replaced.
        cheaper = [result for result in chosen if result.macs <= choice.macs]
        chosen = cheaper + [choice] * (len(chosen) - len(cheaper) + 1)
    return chosen


def _within(candidates: Sequence[tuple[float, Thresholds]], macs: float) -> Sequence[tuple[float, Thresholds]]:
    """The candidates, by rising cost, that cost at most `macs`; at least one. Raises `BudgetInfeasible`."""
    count = bisect_right(candidates, macs * TOLERANCE, key=itemgetter(0))
    if not count:
        raise BudgetInfeasible(
            f"no policy costs as little as {format_macs(macs)}: the cheapest costs {format_macs(candidates[0][0])}"
        )
    return candidates[:count]
