"""From a trace to a frontier: for evenly spaced budgets, the thresholds and what they do on held-out data.

geometric   MSDNet's protocol: for each budget the q whose cost is the largest within it
search      better thresholds of the same cost, where calibration data can tell (see `search`)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mexit.calibrate.geometric import Ranking, geometric
from mexit.calibrate.threshold_search import Found, SearchTable, asked, clearly_better, search
from mexit.core.budget import NAMED_FRACTIONS, Budget, format_macs
from mexit.core.cost import Costs, exit_counts, mean_macs
from mexit.core.policies import FrontierPoint, Outcome
from mexit.core.policy import Thresholds, active_heads, first_exit
from mexit.core.scores import Scorer
from mexit.core.trace import Trace
from mexit.errors import BadInput, BudgetInfeasible, UsageError

POINTS = 41  # every 2.5 % of the way from exit 1 to the last exit, so the named budgets are among them
RATIOS = np.concatenate([[0.0], np.geomspace(1e-3, 1e3, 481), [np.inf]])
MIN_SAMPLES = 20
POLICIES = ("search", "geometric")


@dataclass(frozen=True)
class Candidate:
    """Thresholds of one q, and their mean cost in MACs on the calibration trace."""

    thresholds: Thresholds
    macs: float


class TraceEvaluator:
    """A trace seen through a scorer: says what thresholds do on it."""

    def __init__(self, trace: Trace, scorer: Scorer, costs: Costs) -> None:
        exits = len(costs.cumulative)
        if trace.logits.shape[0] != exits:
            raise BadInput(f"the trace has {trace.logits.shape[0]} exits, the model {exits}")
        self.scores, self.predictions = scorer.answer(trace.logits)
        self.labels = trace.labels
        never = active_heads(scorer.measure, scorer.ensemble, (None,) * (exits - 1))
        self.costs = Costs(costs.cumulative) if all(never) else costs

    def exits(self, thresholds: Thresholds) -> NDArray[np.int64]:
        """The exit that answers each sample, (N,)."""
        return first_exit(self.scores, thresholds)

    def answers(self, thresholds: Thresholds) -> NDArray[np.int64]:
        """The class that each sample gets, (N,)."""
        exits = self.exits(thresholds)
        return self.predictions[exits - 1, np.arange(len(exits))]

    def exit_macs(self, thresholds: Thresholds) -> tuple[int, ...]:
        """What leaving at each exit costs, without the heads of exits where nobody may leave, (E,)."""
        return self.costs.under(asked(thresholds))

    def outcome(self, thresholds: Thresholds) -> Outcome:
        """Cost, accuracy and exits taken under these thresholds."""
        exits = self.exits(thresholds)
        accuracy = None if self.labels is None else float((self.answers(thresholds) == self.labels).mean())
        counts = tuple(int(count) for count in exit_counts(exits, len(self.costs.cumulative)))
        return Outcome(len(exits), mean_macs(exits, self.exit_macs(thresholds)), accuracy, counts)


def candidates(judge: TraceEvaluator) -> list[Candidate]:
    """Geometric thresholds for every q of `RATIOS`, by rising cost."""
    if judge.scores.shape[1] < MIN_SAMPLES:
        raise BadInput(
            f"{judge.scores.shape[1]} samples are too few to set thresholds: at least {MIN_SAMPLES} are needed"
        )
    ranking = Ranking.of(judge.scores)
    found = {geometric(ranking, float(q)) for q in RATIOS}
    costed = [
        Candidate(thresholds, mean_macs(judge.exits(thresholds), judge.exit_macs(thresholds)))
        for thresholds in found
    ]
    return sorted(costed, key=lambda candidate: (candidate.macs, str(candidate.thresholds)))


def frontier(
    calibration: TraceEvaluator,
    held_out: TraceEvaluator | None,
    attacked: TraceEvaluator | None,
    budgets: Mapping[str, Budget],
    policy: str = "geometric",
) -> tuple[tuple[FrontierPoint, ...], dict[str, int]]:
    """Thresholds for a range of budgets.

    Args:
        calibration: chooses the thresholds: for each budget the largest cost not above it.
        held_out: says what they promise; chooses nothing.
        attacked: the same samples under attack; chooses nothing.
        budgets: further budgets by name; the named ones of `core.budget` are always there.
        policy: "search" or "geometric".

    Returns:
        The frontier by rising budget, and each name's place in it.

    Raises:
        BudgetInfeasible: below the cheapest policy; names the nearest feasible budget.
    """
    if policy not in POLICIES:
        raise UsageError(f"unknown policy '{policy}': choose from {', '.join(POLICIES)}")
    costs = calibration.costs.cumulative
    named = {name: Budget.parse(name).macs(costs) for name in NAMED_FRACTIONS}
    named |= {name: budget.macs(costs) for name, budget in budgets.items()}
    wanted = sorted({*np.linspace(costs[0], costs[-1], POINTS).tolist(), *named.values()})
    points = []
    for macs, thresholds in zip(wanted, _choose(calibration, wanted, policy), strict=True):
        points.append(
            FrontierPoint(
                budget_macs=macs,
                thresholds=thresholds,
                calibration=calibration.outcome(thresholds),
                held_out=held_out.outcome(thresholds) if held_out else None,
                attacked=attacked.outcome(thresholds) if attacked else None,
            )
        )
    return tuple(points), {name: wanted.index(macs) for name, macs in named.items()}


def _choose(judge: TraceEvaluator, budgets: Sequence[float], policy: str) -> list[Thresholds]:
    """Thresholds for budgets in MACs; `search` replaces others that it clearly beats.

    Where a budget affords the full network without its early heads, that is what it gets.
    """
    choices = candidates(judge)
    nobody_early: Thresholds = (None,) * (len(judge.costs.cumulative) - 1)
    full_macs = judge.exit_macs(nobody_early)[-1]
    chosen = [nobody_early if macs >= full_macs else _largest_within(choices, macs).thresholds for macs in budgets]
    if policy == "geometric" or judge.labels is None:
        return chosen
    table = SearchTable(Ranking.of(judge.scores), judge.predictions == judge.labels, judge.costs)
    found = search(table)
    for place, macs in enumerate(budgets[:-1]):  # the last is the full network, which nobody leaves early
        better = _most_accurate_within(found, macs)
        if better is not None and clearly_better(table, better.thresholds, chosen[place]):
            chosen[place] = better.thresholds
    return chosen


def _most_accurate_within(found: Sequence[Found], macs: float) -> Found | None:
    within = [point for point in found if point.macs <= macs * (1 + 1e-9)]
    return within[-1] if within else None


def _largest_within(choices: Sequence[Candidate], macs: float) -> Candidate:
    within = [choice for choice in choices if choice.macs <= macs * (1 + 1e-9)]
    if not within:
        raise BudgetInfeasible(
            f"no policy costs as little as {format_macs(macs)}: the cheapest costs {format_macs(choices[0].macs)}"
        )
    return within[-1]
