"""The frontier: thresholds for evenly spaced budgets, with their cost and accuracy on held-out data.

geometric   MSDNet's protocol: for each budget the q with the largest cost within it
search      thresholds of equal cost and higher accuracy, where the calibration data shows a clear difference (see
            `threshold_search`)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mexit.calibrate.geometric import geometric
from mexit.calibrate.threshold_search import clearly_better, search_thresholds
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.budget import NAMED_FRACTIONS, Budget, format_macs
from mexit.core.exit_policy import Thresholds
from mexit.core.policies_file import FrontierPoint
from mexit.errors import BadInput, BudgetInfeasible, UsageError

POINTS = 41  # every 2.5 % between the costs of exit 1 and the last exit, so the named budgets are among them
RATIOS = np.concatenate([[0.0], np.geomspace(1e-3, 1e3, 481), [np.inf]])
MIN_SAMPLES = 20
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

    A budget that covers the full network without its early heads gets exactly that.
    """
    candidates = geometric_candidates(evaluator)
    full: Thresholds = (None,) * (len(evaluator.costs.cumulative) - 1)
    full_macs = evaluator.costs.under([False] * len(full))[-1]
    selected = [full if macs >= full_macs else _largest_within(candidates, macs) for macs in budgets]
    if policy == "geometric" or evaluator.labels is None:
        return selected
    results = search_thresholds(evaluator)
    for index, macs in enumerate(budgets[:-1]):  # the last budget is the full network
        within = [result.thresholds for result in results if result.macs <= macs * (1 + 1e-9)]
        if within and clearly_better(evaluator, within[-1], selected[index]):
            selected[index] = within[-1]
    return selected


def _largest_within(candidates: Sequence[tuple[float, Thresholds]], macs: float) -> Thresholds:
    within = [thresholds for cost, thresholds in candidates if cost <= macs * (1 + 1e-9)]
    if not within:
        raise BudgetInfeasible(
            f"no policy costs as little as {format_macs(macs)}: the cheapest costs {format_macs(candidates[0][0])}"
        )
    return within[-1]
