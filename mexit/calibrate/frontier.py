"""The frontier: thresholds for evenly spaced budgets, with their cost and accuracy on held-out data.

geometric   MSDNet's protocol: for each budget the q with the largest cost within it that keeps the order of budgets
search      thresholds of equal cost and higher accuracy, where the calibration data shows a clear difference (see
            `threshold_search`)

On the data that selects the thresholds, a larger budget is never cheaper nor less accurate than a smaller one (see
`budget_order`). Budgets may get the same thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mexit.calibrate.budget_order import TOLERANCE, select_in_order
from mexit.calibrate.geometric import geometric
from mexit.calibrate.threshold_search import measure_thresholds, search_thresholds
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.budget import NAMED_FRACTIONS, Budget, format_macs
from mexit.core.exit_policy import Thresholds
from mexit.core.policies_file import FrontierPoint
from mexit.core.trace import MIN_SAMPLES
from mexit.errors import BadInput, BudgetInfeasible, UsageError

POINTS = 41  # every 2.5 % between the costs of exit 1 and the last exit, so the named budgets are among them
RATIOS = np.concatenate([[0.0], np.geomspace(1e-3, 1e3, 481), [np.inf]])
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
    """Thresholds for rising budgets in MACs. Budgets of the full cost and more never exit early."""
    full: Thresholds = (None,) * (len(evaluator.costs.cumulative) - 1)
    full_macs = evaluator.costs.under([False] * len(full))[-1]
    candidates = [candidate for candidate in geometric_candidates(evaluator) if candidate[0] < full_macs]
    candidates.append((full_macs, full))
    below = [macs for macs in budgets if macs < evaluator.costs.cumulative[-1]]
    if below and below[0] * TOLERANCE < candidates[0][0]:
        cheapest = format_macs(candidates[0][0])
        raise BudgetInfeasible(f"no policy costs as little as {format_macs(below[0])}: the cheapest costs {cheapest}")
    if not below or evaluator.labels is None:
        selected = [_largest_within(candidates, macs) for macs in below]
    else:
        found = search_thresholds(evaluator) if policy == "search" else []
        measured = [measure_thresholds(evaluator, thresholds) for _, thresholds in candidates]
        searched = [measure_thresholds(evaluator, one.thresholds) for one in found if one.macs <= full_macs]
        selected = select_in_order(evaluator, below, measured, searched)
    return selected + [full] * (len(budgets) - len(below))


def _largest_within(candidates: Sequence[tuple[float, Thresholds]], macs: float) -> Thresholds:
    """The thresholds of the costliest candidate within a budget; candidates by rising cost."""
    return [thresholds for cost, thresholds in candidates if cost <= macs * TOLERANCE][-1]
