"""Threshold search: higher accuracy than geometric thresholds of the same cost.

    up to 4 exits   exact on a grid of quantiles: cumulative histograms of the samples' ranks at each exit give cost
                    and correct answers of all combinations of thresholds at once
    more exits      coordinate ascent on correct answers - price x cost, for a range of prices and from several
                    geometric starts: with the other thresholds fixed, the best threshold of one exit is the best
                    prefix of its sorted scores

A result replaces the geometric thresholds of a budget only if it is correct more often on the calibration data by
more than two standard errors of the paired difference: the best of thousands of combinations is biased upwards, and
smaller differences do not generalise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from mexit.calibrate.clusters import group_sums
from mexit.calibrate.geometric import ALWAYS, Ranking, geometric
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.exit_policy import Thresholds, should_exit
from mexit.core.scores import Floats

GRID_EXITS = 4
GRID = {2: 512, 3: 128, 4: 40}
PRICES = np.geomspace(0.02, 4.0, 24)  # share of correct answers that the static network's cost is worth
STARTS = (0.1, 0.5, 1.0, 2.0)
SWEEPS = 6
STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class ThresholdResult:
    """Thresholds, their mean cost in the unit of the costs, and their accuracy on the calibration trace."""

    thresholds: Thresholds
    cost: float
    accuracy: float


def search_thresholds(evaluator: TraceEvaluator) -> list[ThresholdResult]:
    """Thresholds with higher accuracy than all cheaper ones, by rising cost."""
    exits = len(evaluator.costs.cumulative)
    if exits == 1:
        return [measure_thresholds(evaluator, ())]
    return pareto_front(_search_grid(evaluator) if exits <= GRID_EXITS else _ascend_from_all_starts(evaluator))


def measure_thresholds(evaluator: TraceEvaluator, thresholds: Thresholds) -> ThresholdResult:
    """Mean cost and accuracy of thresholds on the trace, which has labels."""
    cost, accuracy = evaluator.spent(thresholds).mean(), evaluator.hits(thresholds).mean()
    return ThresholdResult(thresholds, float(cost), float(accuracy))


def pareto_front(results: Iterable[ThresholdResult]) -> list[ThresholdResult]:
    """The results with higher accuracy than all cheaper ones, by rising cost."""
    front: list[ThresholdResult] = []
    for result in sorted(results, key=lambda result: (result.cost, -result.accuracy)):
        if not front or result.accuracy > front[-1].accuracy:
            front.append(result)
    return front


def clearly_better(evaluator: TraceEvaluator, thresholds: Thresholds, baseline: Thresholds) -> bool:
    """Whether thresholds beat a baseline by more than `STANDARD_ERRORS` of the paired difference in correctness.

    The standard error counts groups where there are some.
    """
    gains = evaluator.hits(thresholds).astype(np.float64) - evaluator.hits(baseline)
    per_group, _ = group_sums(gains, evaluator.groups)
    return bool(gains.sum() > STANDARD_ERRORS * np.sqrt((per_group**2).sum()))


def _search_grid(evaluator: TraceEvaluator) -> list[ThresholdResult]:
    """The Pareto front of all combinations of quantile thresholds, through cumulative histograms."""
    exits, samples = evaluator.correct.shape
    cuts = [_cut_points(evaluator.ranking, k, GRID[exits]) for k in range(exits - 1)]
    # A sample in bin b of exit k leaves there under the thresholds b, b + 1, ...; cut points fall.
    bins = [
        np.searchsorted(-np.array(points), -evaluator.ranking.scores[k], side="left") for k, points in enumerate(cuts)
    ]
    sizes = [len(points) for points in cuts]
    hits, cost = np.zeros(sizes), np.zeros(sizes)
    for k in range(exits):
        shape = [size if axis <= k else 1 for axis, size in enumerate(sizes)]
        hits += _leaving(bins, sizes, k, evaluator.correct[k].astype(np.float64)).reshape(shape)
        leaving = _leaving(bins, sizes, k, np.ones(samples)).reshape(shape)
        cost += evaluator.costs.cumulative[k] * leaving
    static = (0,) * len(sizes)  # the first cut point of every exit is "no exit here"
    hits[static] = evaluator.hits((None,) * len(sizes)).sum()
    cost[static] = evaluator.costs.static * samples
    return _front_of_grid(cuts, hits / samples, cost / samples)


def _cut_points(ranking: Ranking, k: int, count: int) -> list[float]:
    """Falling thresholds of exit k (from 0): infinity (no exit here), quantiles, and `ALWAYS`."""
    scores = ranking.scores[k, ranking.order[k]]
    scores = scores[~np.isnan(scores)]
    distinct = np.unique(scores)[::-1]
    middles = (distinct[:-1] + distinct[1:]) / 2
    if len(middles) > count:
        quantiles = scores[np.linspace(0, len(scores) - 1, count).astype(int)]
        positions = np.unique(np.searchsorted(-distinct, -quantiles))
        middles = middles[positions[positions < len(middles)]]
    return [np.inf, *middles.tolist(), ALWAYS]


def _leaving(bins: Sequence[NDArray[np.intp]], sizes: Sequence[int], k: int, weight: Floats) -> Floats:
    """Total weight of the samples that leave at exit k (from 0), for all combinations of thresholds of exits 0..k."""
    last = k == len(bins)
    axes = [*bins[:k]] + ([] if last else [bins[k]])
    shape = [size + 1 for size in sizes[: len(axes)]]
    counts = np.zeros(shape)
    np.add.at(counts, tuple(axes), weight)
    for axis in range(k):  # a sample stays if its bin lies behind the threshold's
        counts = np.flip(np.cumsum(np.flip(counts, axis), axis), axis)
        counts = np.take(counts, np.arange(1, shape[axis]), axis)
    if not last:
        counts = np.take(np.cumsum(counts, k), np.arange(sizes[k]), k)
    return counts


def _front_of_grid(cuts: Sequence[Sequence[float]], accuracy: Floats, cost: Floats) -> list[ThresholdResult]:
    order = np.lexsort((-accuracy.ravel(), cost.ravel()))
    best = np.maximum.accumulate(accuracy.ravel()[order])
    results = []
    for position in order[np.concatenate([[True], best[1:] > best[:-1]])]:
        index = np.unravel_index(position, accuracy.shape)
        values = [points[i] for points, i in zip(cuts, index, strict=True)]
        thresholds = tuple(None if np.isinf(value) else float(value) for value in values)
        results.append(ThresholdResult(thresholds, float(cost.flat[position]), float(accuracy.flat[position])))
    return results


def _ascend_from_all_starts(evaluator: TraceEvaluator) -> list[ThresholdResult]:
    starts = [geometric(evaluator.ranking, q) for q in STARTS]
    return [
        measure_thresholds(evaluator, coordinate_ascent(evaluator, float(price), start))
        for price, start in product(PRICES, starts)
    ]


def coordinate_ascent(evaluator: TraceEvaluator, price: float, start: Thresholds) -> Thresholds:
    """Raise correct answers - price x cost / static cost, one threshold at a time, from `start`."""
    current = list(start)
    for _ in range(SWEEPS):
        before = list(current)
        for k in reversed(range(len(current))):
            current[k] = _best_threshold(evaluator, price, current, k)
        if current == before:
            break
    return tuple(current)


def _best_threshold(
    evaluator: TraceEvaluator, price: float, thresholds: Sequence[float | None], k: int
) -> float | None:
    """The best threshold of exit k (from 0) with the others fixed; None if no exit there is at least as good."""
    ranking = evaluator.ranking
    scores = ranking.scores
    value = evaluator.correct - price * np.asarray(evaluator.costs.cumulative)[:, None] / evaluator.costs.static
    reaches = np.ones(scores.shape[1], np.bool_)
    for earlier in range(k):
        reaches &= ~should_exit(scores[earlier], thresholds[earlier])
    later = value[-1].copy()
    for number in range(len(thresholds) - 1, k, -1):
        leaves = should_exit(scores[number], thresholds[number])
        later[leaves] = value[number, leaves]
    order = ranking.order[k]
    order = order[reaches[order]]
    falling = scores[k, order]
    order = order[~np.isnan(falling)]
    falling = falling[: len(order)]
    if not len(order):
        return None
    gains = np.cumsum(value[k, order] - later[order])
    ends = np.append(falling[1:] < falling[:-1], True)  # tied scores leave together
    gains[~ends] = -np.inf
    best = int(np.argmax(gains))
    if gains[best] <= 0:
        return None
    return ALWAYS if best + 1 >= len(falling) else float((falling[best] + falling[best + 1]) / 2)
