"""A frontier stays within its budgets and is measured on held-out data; infeasible budgets are refused."""

from __future__ import annotations

import numpy as np
import pytest

from mexit.calibrate.frontier import frontier
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.budget import Budget
from mexit.core.cost import Costs
from mexit.core.scores import Scorer
from mexit.core.trace import Origin, Trace
from mexit.errors import BadInput, BudgetInfeasible, UsageError

COSTS = Costs((100, 400, 1000), 1000)
SCORER = Scorer("max-probability", False, (1.0,) * 3, 4)


def make_trace(samples: int, seed: int = 0, exits: int = 3) -> Trace:
    """Logits whose confidence and accuracy grow with depth."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, samples)
    logits = rng.normal(size=(exits, samples, 4)).astype(np.float32)
    for k in range(exits):
        logits[k, np.arange(samples), labels] += 1.5 + k
    origin = Origin("m", "fp32", "ort", "fp32", "calibration", "clean", "d")
    return Trace(logits, labels, np.arange(samples), origin)


@pytest.fixture(scope="module")
def evaluator() -> TraceEvaluator:
    return TraceEvaluator.of(make_trace(500), SCORER, COSTS)


def test_cost_on_calibration_never_exceeds_the_budget_and_comes_near_it(evaluator) -> None:
    points, named = frontier(evaluator, None, None, {})
    for point in points:
        assert point.calibration.mean_macs <= point.budget_macs * (1 + 1e-9)
    for name in ("low", "medium", "high", "full"):
        point = points[named[name]]
        assert point.calibration.mean_macs > 0.95 * point.budget_macs


def test_a_lower_budget_never_costs_more(evaluator) -> None:
    points, _ = frontier(evaluator, None, None, {})
    costs = [point.calibration.mean_macs for point in points]
    assert costs == sorted(costs)
    assert points[0].calibration.exits == (500, 0, 0)
    assert points[-1].calibration.exits == (0, 0, 500)


def test_held_out_data_does_not_change_the_thresholds(evaluator) -> None:
    without, _ = frontier(evaluator, None, None, {})
    measured, _ = frontier(evaluator, TraceEvaluator.of(make_trace(300, seed=1), SCORER, COSTS), None, {})
    assert [point.thresholds for point in without] == [point.thresholds for point in measured]
    assert measured[10].held_out is not None
    assert measured[10].held_out.n == 300


def test_the_outcome_equals_a_plain_count(evaluator) -> None:
    point = frontier(evaluator, None, None, {})[0][20]
    correct, spent, exits = 0, 0, [0, 0, 0]
    trace = make_trace(500)
    for row in range(500):
        for k in range(3):
            z = trace.logits[k, row].astype(np.float64)
            others = np.log(np.exp(np.delete(z, z.argmax())).sum())
            threshold = point.thresholds[k] if k < 2 else -np.inf
            if threshold is not None and z.max() - others >= threshold:
                correct += int(z.argmax() == trace.labels[row])
                spent, exits[k] = spent + COSTS.cumulative[k], exits[k] + 1
                break
    assert point.calibration.accuracy == pytest.approx(correct / 500)
    assert point.calibration.mean_macs == pytest.approx(spent / 500)
    assert list(point.calibration.exits) == exits


def test_further_budgets_get_their_names(evaluator) -> None:
    points, named = frontier(evaluator, None, None, {"night": Budget.parse("33%")})
    assert points[named["night"]].budget_macs == 330


def test_a_budget_below_exit_1_names_the_nearest(evaluator) -> None:
    with pytest.raises(BudgetInfeasible, match="nearest feasible budget is 100"):
        frontier(evaluator, None, None, {"tiny": Budget.parse("5%")})


def test_unusable_traces_are_refused() -> None:
    with pytest.raises(BadInput, match="at least 20"):
        frontier(TraceEvaluator.of(make_trace(19), SCORER, COSTS), None, None, {})
    with pytest.raises(BadInput, match="2 exits"):
        TraceEvaluator.of(make_trace(50, exits=2), Scorer("margin", False, (1.0, 1.0), 4), COSTS)


def overthinking_trace(samples: int, seed: int = 0) -> Trace:
    """Exit 1 is correct on easy inputs and the last exit is wrong: early exit is cheaper and more accurate."""
    trace = make_trace(samples, seed)
    rng = np.random.default_rng(seed + 1)
    easy = rng.random(samples) < 0.5
    logits = trace.logits.copy()
    logits[0, easy, trace.labels[easy]] += 6
    logits[2, easy] = rng.normal(size=(int(easy.sum()), 4))
    return Trace(logits, trace.labels, trace.index, trace.origin)


@pytest.mark.parametrize("make", [make_trace, overthinking_trace])
def test_search_is_never_worse_than_geometric_on_calibration_data(make) -> None:
    evaluator = TraceEvaluator.of(make(800), SCORER, COSTS)
    searched, _ = frontier(evaluator, None, None, {}, "search")
    plain, _ = frontier(evaluator, None, None, {}, "geometric")
    for ours, theirs in zip(searched, plain, strict=True):
        assert ours.calibration.mean_macs <= ours.budget_macs * (1 + 1e-9)
        assert ours.calibration.accuracy >= theirs.calibration.accuracy


def test_budgets_stay_at_the_most_accurate_policy_where_later_exits_are_less_accurate() -> None:
    evaluator = TraceEvaluator.of(overthinking_trace(800), SCORER, COSTS)
    held_out = TraceEvaluator.of(overthinking_trace(800, seed=9), SCORER, COSTS)
    for policy in ("search", "geometric"):
        points, named = frontier(evaluator, held_out, None, {}, policy)
        high, full = points[named["high"]], points[named["full"]]
        assert high.held_out.accuracy > full.held_out.accuracy + 0.05
        assert full.thresholds == (None, None)


def useless_middle_trace(samples: int, seed: int = 0) -> Trace:
    """The answers of exit 2 are random: geometric thresholds give it a share of the samples, a search need not."""
    trace = make_trace(samples, seed)
    logits = trace.logits.copy()
    logits[1] = np.random.default_rng(seed + 1).normal(size=(samples, 4))
    return Trace(logits, trace.labels, trace.index, trace.origin)


def test_search_is_better_where_an_exit_is_useless() -> None:
    evaluator = TraceEvaluator.of(useless_middle_trace(800), SCORER, COSTS)
    held_out = TraceEvaluator.of(useless_middle_trace(800, seed=9), SCORER, COSTS)
    searched, named = frontier(evaluator, held_out, None, {}, "search")
    plain, _ = frontier(evaluator, held_out, None, {}, "geometric")
    medium = named["medium"]
    assert searched[medium].held_out.accuracy > plain[medium].held_out.accuracy + 0.05
    assert searched[medium].thresholds[1] is None


def test_an_unknown_policy_is_refused(evaluator) -> None:
    with pytest.raises(UsageError, match="search, geometric"):
        frontier(evaluator, None, None, {}, "greedy")


STATIC = Costs((100, 400, 1000), 700)


@pytest.mark.parametrize("policy", ["geometric", "search"])
def test_no_policy_costs_more_than_the_static_network(policy) -> None:
    evaluator = TraceEvaluator.of(make_trace(800), SCORER, STATIC)
    points, named = frontier(evaluator, None, None, {}, policy)
    assert [points[named[name]].budget_macs for name in ("low", "medium", "high", "full")] == [250, 400, 550, 700]
    for point in points[:-1]:
        assert point.calibration.mean_macs < 700
        plain = np.dot(point.calibration.exits, STATIC.cumulative) / 800
        assert point.calibration.mean_macs == pytest.approx(plain)
    assert points[-1].thresholds == (None, None)
    assert points[-1].calibration.mean_macs == 700


def test_every_budget_is_the_static_network_where_exit_1_is_not_cheaper() -> None:
    evaluator = TraceEvaluator.of(make_trace(200), SCORER, Costs((990, 1400, 2000), 1000, "us"))
    points, named = frontier(evaluator, None, None, {})
    assert named == {"low": 0, "medium": 0, "high": 0, "full": 0}
    assert [(point.thresholds, point.calibration.mean_macs) for point in points] == [((None, None), 1000)]


def test_the_static_network_answers_without_the_ensemble() -> None:
    trace = make_trace(400)
    evaluator = TraceEvaluator.of(trace, Scorer("max-probability", True, (1.0,) * 3, 4), STATIC)
    alone = trace.logits[-1].argmax(axis=1)
    assert (evaluator.answers((None, None)) == alone).all()
    assert (evaluator.predictions[-1] != alone).any()
    assert evaluator.outcome((None, None)).accuracy == pytest.approx((alone == trace.labels).mean())
