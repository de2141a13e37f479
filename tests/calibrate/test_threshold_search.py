"""Threshold search against brute force and against geometric thresholds."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from mexit.calibrate.geometric import ALWAYS, geometric
from mexit.calibrate.threshold_search import (
    clearly_better,
    coordinate_ascent,
    pareto_front,
    search_thresholds,
)
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.cost import Costs

COSTS = {2: (100, 400), 3: (100, 400, 1000), 4: (10, 20, 60, 100), 6: (10, 20, 30, 50, 70, 100)}
STATIC = {2: 330, 3: 800, 4: 83, 6: 76}


def evaluator_of(scores: np.ndarray, correct: np.ndarray, costs: Costs) -> TraceEvaluator:
    return TraceEvaluator(scores, correct.astype(np.int64), np.ones(scores.shape[1], np.int64), costs)


def make_evaluator(exits: int, samples: int, seed: int = 0, static: int | None = None) -> TraceEvaluator:
    """Exits whose scores correlate with correctness."""
    rng = np.random.default_rng(seed)
    hardness = rng.normal(size=samples)
    scores = -hardness + rng.normal(scale=0.7, size=(exits, samples))
    correct = scores + rng.normal(size=(exits, samples)) + 0.5 * np.arange(exits)[:, None] > -0.5
    return evaluator_of(np.round(scores, 2), correct, Costs(COSTS[exits], static or COSTS[exits][-1]))


@pytest.mark.parametrize("static", [{}, STATIC], ids=["no static network", "static network"])
@pytest.mark.parametrize("exits", [2, 3, 4])
def test_the_grid_search_equals_brute_force_where_the_grid_has_every_threshold(exits, static) -> None:
    evaluator = make_evaluator(exits, 12, static=static.get(exits))
    choices = []
    for k in range(exits - 1):
        distinct = np.unique(evaluator.scores[k])[::-1]
        choices.append([None, *((distinct[:-1] + distinct[1:]) / 2).tolist(), ALWAYS])
    best: dict[float, float] = {}
    for thresholds in product(*choices):
        macs, accuracy = evaluator.spent(thresholds).mean(), float(evaluator.hits(thresholds).mean())
        best[macs] = max(best.get(macs, 0.0), accuracy)
    front, top = [], -1.0
    for macs in sorted(best):
        if best[macs] > top:
            top = best[macs]
            front.append((macs, top))
    assert [
        (pytest.approx(result.cost), pytest.approx(result.accuracy)) for result in search_thresholds(evaluator)
    ] == front


@pytest.mark.parametrize("static", [{}, STATIC], ids=["no static network", "static network"])
@pytest.mark.parametrize("exits", [2, 3, 4, 6])
def test_reported_cost_and_accuracy_are_those_of_the_thresholds(exits, static) -> None:
    evaluator = make_evaluator(exits, 500, static=static.get(exits))
    results = search_thresholds(evaluator)
    assert len(results) > 3
    for point in results:
        assert point.cost == pytest.approx(evaluator.spent(point.thresholds).mean())
        assert point.accuracy == pytest.approx(evaluator.hits(point.thresholds).mean())
    assert [point.cost for point in results] == sorted(point.cost for point in results)
    assert [point.accuracy for point in results] == sorted(point.accuracy for point in results)


@pytest.mark.parametrize("exits", [3, 4, 6])
def test_search_is_more_accurate_than_geometric_at_equal_cost(exits) -> None:
    evaluator = make_evaluator(exits, 3000, seed=1)
    results = search_thresholds(evaluator)
    better = 0
    for q in np.geomspace(0.2, 4, 15):
        thresholds = geometric(evaluator.ranking, float(q))
        within = [point.accuracy for point in results if point.cost <= evaluator.spent(thresholds).mean()]
        better += bool(within) and within[-1] > evaluator.hits(thresholds).mean()
    assert better >= 8


@pytest.mark.parametrize("static", [None, STATIC[6]], ids=["no static network", "static network"])
def test_ascent_never_ends_below_its_start(static) -> None:
    evaluator = make_evaluator(6, 400, static=static)
    for price in (0.05, 0.5, 2.0):
        for q in (0.3, 1.0, 3.0):
            start = geometric(evaluator.ranking, q)

            def cost_of(thresholds):  # the ascent does not know that no exit at all is cheaper
                return np.asarray(evaluator.costs.cumulative)[evaluator.exits(thresholds) - 1].mean()

            def value(thresholds, price=price):
                return evaluator.hits(thresholds).mean() - price * cost_of(thresholds) / evaluator.costs.static

            thresholds = coordinate_ascent(evaluator, price, start)
            assert value(thresholds) >= value(start) - 1e-12
            for k in range(5):  # no single threshold can be removed with a gain
                assert value(thresholds) >= value((*thresholds[:k], None, *thresholds[k + 1 :])) - 1e-12


def test_one_exit_has_one_policy() -> None:
    evaluator = evaluator_of(np.zeros((1, 5)), np.ones((1, 5), bool), Costs((7,), 7))
    (result,) = search_thresholds(evaluator)
    assert (result.thresholds, result.cost, result.accuracy) == ((), 7.0, 1.0)


def test_nan_scores_never_leave_early() -> None:
    evaluator = make_evaluator(3, 60)
    evaluator.scores[0, :5] = np.nan
    evaluator = evaluator_of(evaluator.scores, evaluator.correct, evaluator.costs)
    for result in search_thresholds(evaluator):
        assert (evaluator.exits(result.thresholds)[:5] > 1).all()


def test_small_differences_are_not_clearly_better() -> None:
    """The differences are in standard errors."""
    correct = np.zeros((2, 100), bool)
    correct[0, :50] = True
    correct[1, :55] = True
    scores, costs = np.zeros((2, 100)), Costs((1, 2), 2)
    assert clearly_better(evaluator_of(scores, correct, costs), (None,), (ALWAYS,))  # 5 wins, no loss: 2.2
    correct[0, 60] = True
    assert not clearly_better(evaluator_of(scores, correct, costs), (None,), (ALWAYS,))  # 5 wins, 1 loss: 1.6
    assert pareto_front([]) == []
