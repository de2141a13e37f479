"""On the calibration data a larger budget is never cheaper nor less accurate than a smaller one: random traces."""

from __future__ import annotations

import numpy as np
import pytest

from mexit.calibrate.frontier import frontier
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.budget import Budget
from mexit.core.cost import Costs
from mexit.core.policies_file import FrontierPoint
from mexit.core.scores import Scorer
from mexit.core.trace import Origin, Trace

CLASSES = 4
USER_BUDGETS = {"third": "33%", "half": "51%", "most": "97%", "all": "100%", "above": "5k"}


def random_case(seed: int, exits: int, *, labels: bool = True) -> TraceEvaluator:
    """A trace whose exits are good or bad at random, with ties, missing scores and heads that can be left out."""
    rng = np.random.default_rng(seed)
    samples = int(rng.integers(40, 250))
    truth = rng.integers(0, CLASSES, samples)
    logits = rng.normal(size=(exits, samples, CLASSES))
    for k in range(exits):
        logits[k, np.arange(samples), truth] += rng.uniform(-1, 4)
    if seed % 3 == 0:
        logits = logits.round()  # ties
    if seed % 5 == 0:
        logits[1:-1, : samples // 10] = np.nan  # these scores reach no threshold
    origin = Origin("m", "fp32", "ort", "fp32", "calibration", "clean", "d")
    trace = Trace(logits.astype(np.float32), truth if labels else None, np.arange(samples), origin)
    steps = rng.integers(20, 900, exits)
    heads = (*(steps[:-1] // int(rng.integers(2, 12))).tolist(), 0) if seed % 2 else ()
    measure = ("max-probability", "margin", "entropy", "agreement")[seed % 4]
    scorer = Scorer(measure, bool(seed % 7 == 0), (1.0,) * exits, CLASSES)
    return TraceEvaluator.of(trace, scorer, Costs(tuple(np.cumsum(steps).tolist()), heads))


def select(evaluator: TraceEvaluator, policy: str) -> tuple[tuple[FrontierPoint, ...], dict[str, int]]:
    full = evaluator.costs.cumulative[-1]
    first = evaluator.costs.cumulative[0]
    budgets = {name: Budget.parse(text) for name, text in USER_BUDGETS.items()}
    feasible = {
        name: budget for name, budget in budgets.items() if budget.kind == "macs" or budget.value * full > first
    }
    return frontier(evaluator, None, None, feasible, policy)


def check(points: tuple[FrontierPoint, ...], evaluator: TraceEvaluator) -> None:
    """Costs and accuracies rise with the budget; the full network, which selects nothing, may be less accurate."""
    costs = [point.calibration.mean_macs for point in points]
    assert costs == sorted(costs)
    assert all(point.calibration.mean_macs <= point.budget_macs * (1 + 1e-9) for point in points)
    full = evaluator.costs.cumulative[-1]
    below = [point for point in points if point.budget_macs < full]
    if evaluator.labels is not None:
        accuracies = [point.calibration.accuracy for point in below]
        assert accuracies == sorted(accuracies)
    for point in points[len(below) :]:
        assert set(point.thresholds) <= {None}
    assert len(below) < len(points)


@pytest.mark.parametrize("policy", ["search", "geometric"])
@pytest.mark.parametrize(("exits", "seeds"), [(1, 2), (2, 16), (3, 24), (4, 10), (6, 3)])
def test_cost_and_accuracy_rise_with_the_budget(policy: str, exits: int, seeds: int) -> None:
    for seed in range(seeds):
        evaluator = random_case(seed, exits)
        points, named = select(evaluator, policy)
        check(points, evaluator)
        assert set(points[named["full"]].thresholds) <= {None}


@pytest.mark.parametrize("policy", ["search", "geometric"])
def test_cost_rises_with_the_budget_without_labels(policy: str) -> None:
    for seed in range(20):
        evaluator = random_case(seed, 3, labels=False)
        check(select(evaluator, policy)[0], evaluator)


def test_a_cheaper_and_more_accurate_search_result_replaces_smaller_budgets() -> None:
    """Somewhere among the traces the search result of one budget is cheaper than the thresholds of a smaller one."""
    coincide = 0
    for seed in range(24):
        points, named = select(random_case(seed, 3), "search")
        coincide += points[named["medium"]].thresholds == points[named["high"]].thresholds
    assert 0 < coincide < 24


@pytest.mark.parametrize("policy", ["search", "geometric"])
def test_full_is_not_cheaper_than_a_budget_that_would_pay_for_heads(policy: str) -> None:
    """Budgets between the full network without early heads and with them."""
    for seed in range(1, 24, 2):
        evaluator = random_case(seed, 3)
        points, named = select(evaluator, policy)
        full = points[named["full"]].calibration.mean_macs
        assert all(point.calibration.mean_macs <= full for point in points)
