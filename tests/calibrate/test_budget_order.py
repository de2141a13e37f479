"""On the calibration data a larger budget is never cheaper nor less accurate than a smaller one: random traces."""

from __future__ import annotations

import numpy as np
import pytest

from mexit.calibrate.frontier import frontier
from mexit.calibrate.threshold_search import clearly_better
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.budget import Budget
from mexit.core.cost import Costs
from mexit.core.policies_file import FrontierPoint
from mexit.core.scores import Scorer
from mexit.core.trace import Origin, Trace

CLASSES = 4
USER_BUDGETS = {"third": "33%", "half": "51%", "most": "97%", "all": "100%", "above": "5k"}


def random_case(seed: int, exits: int, *, labels: bool = True) -> TraceEvaluator:
    """A trace whose exits are good or bad at random, with ties, missing scores, and a static network."""
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
    total = int(steps.sum())
    static = total - int(steps[:-1].sum()) // int(rng.integers(2, 12)) if seed % 2 else total
    measure = ("max-probability", "margin", "entropy", "agreement")[seed % 4]
    scorer = Scorer(measure, bool(seed % 7 == 0), (1.0,) * exits, CLASSES)
    return TraceEvaluator.of(trace, scorer, Costs(tuple(np.cumsum(steps).tolist()), static))


def select(evaluator: TraceEvaluator, policy: str) -> tuple[tuple[FrontierPoint, ...], dict[str, int]]:
    full, first = evaluator.costs.static, evaluator.costs.first
    budgets = {name: Budget.parse(text) for name, text in USER_BUDGETS.items()}
    feasible = {
        name: budget for name, budget in budgets.items() if budget.kind == "macs" or budget.value * full > first
    }
    return frontier(evaluator, None, None, feasible, policy)


def check(points: tuple[FrontierPoint, ...], evaluator: TraceEvaluator) -> None:
    """Costs and accuracies rise with the budget, the full network included, unless early exits are clearly better."""
    costs = [point.calibration.mean_macs for point in points]
    assert costs == sorted(costs)
    assert all(point.calibration.mean_macs <= point.budget_macs * (1 + 1e-9) for point in points)
    full = evaluator.costs.static
    below = [point for point in points if point.budget_macs < full]
    if evaluator.labels is not None:
        accuracies = [point.calibration.accuracy for point in below]
        assert accuracies == sorted(accuracies)
        last = points[-1]
        for point in below:
            assert (
                point.calibration.accuracy <= last.calibration.accuracy
                or clearly_better(evaluator, point.thresholds, last.thresholds)
                or below[0].calibration.accuracy > last.calibration.accuracy  # exit 1 alone is
            )
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


def noisy_trace(samples: int, seed: int, later_accuracy: float) -> TraceEvaluator:
    """Two exits: the first is correct on 90 % of the samples, its confidence says nothing; then `later_accuracy`."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, CLASSES, samples)
    logits = np.zeros((2, samples, CLASSES))
    for k, accuracy in enumerate((0.9, later_accuracy)):
        answer = np.where(rng.random(samples) < accuracy, truth, (truth + 1) % CLASSES)
        logits[k, np.arange(samples), answer] = rng.uniform(1, 3, samples)
    origin = Origin("m", "fp32", "ort", "fp32", "calibration", "clean", "d")
    trace = Trace(logits.astype(np.float32), truth, np.arange(samples), origin)
    return TraceEvaluator.of(trace, Scorer("max-probability", False, (1.0,) * 2, CLASSES), Costs((100, 1000), 1000))


def lucky_trace() -> TraceEvaluator:
    """Two exits of 10 % errors, 200 samples by falling confidence. Only costs of 415 to 460 have one error less."""
    samples = 200
    wrong = np.zeros((2, samples), np.bool_)
    wrong[:, 20:40] = True
    wrong[1, 120] = True  # exit 1 is correct
    wrong[0, [10, 11, 130, 140]] = True  # exit 2 is correct
    truth = np.zeros(samples, np.int64)
    logits = np.zeros((2, samples, CLASSES), np.float32)
    for k in range(2):
        logits[k, np.arange(samples), wrong[k].astype(np.int64)] = np.linspace(9, 1, samples)
    origin = Origin("m", "fp32", "ort", "fp32", "calibration", "clean", "d")
    trace = Trace(logits, truth, np.arange(samples), origin)
    return TraceEvaluator.of(trace, Scorer("max-probability", False, (1.0,) * 2, CLASSES), Costs((100, 1000), 1000))


@pytest.mark.parametrize("policy", ["search", "geometric"])
def test_one_lucky_sample_does_not_keep_budgets_from_being_used(policy: str) -> None:
    points, named = select(lucky_trace(), policy)
    for name in ("low", "medium", "high"):
        point = points[named[name]]
        assert point.calibration.mean_macs > 0.95 * point.budget_macs


@pytest.mark.parametrize("policy", ["search", "geometric"])
def test_budgets_coincide_where_later_exits_are_clearly_worse(policy: str) -> None:
    for seed in range(4):
        points, named = select(noisy_trace(1000, seed, 0.5), policy)
        assert points[named["medium"]].thresholds == points[named["high"]].thresholds
        assert points[named["high"]].calibration.accuracy > points[named["full"]].calibration.accuracy + 0.2


@pytest.mark.parametrize("policy", ["search", "geometric"])
def test_full_is_the_most_expensive_budget(policy: str) -> None:
    for seed in range(1, 24, 2):
        evaluator = random_case(seed, 3)
        points, named = select(evaluator, policy)
        full = points[named["full"]].calibration.mean_macs
        assert all(point.calibration.mean_macs <= full for point in points)
