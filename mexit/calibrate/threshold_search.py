"""Better thresholds than geometric ones, where the calibration data can tell.

    up to 4 exits   exact on a grid of quantiles: the histogram of where samples rank at each exit, summed from
                    the sure end, gives cost and right answers of every combination of thresholds at once
    more exits      coordinate ascent on right answers - price x cost, for a range of prices, each started from
                    geometric thresholds: given the others, the best threshold of one exit is the best prefix of
                    its sorted scores

For a budget, geometric's thresholds stand unless the best found within it are right more often on calibration
data by more than two standard errors of the paired difference: the best of thousands of combinations is better
than it looks, and smaller differences do not carry over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from mexit.calibrate.geometric import ALWAYS, Ranking, geometric
from mexit.core.cost import Costs, mean_macs
from mexit.core.policy import Thresholds, first_exit, should_exit
from mexit.core.scores import Floats

GRID_EXITS = 4
GRID = {2: 512, 3: 128, 4: 40}
PRICES = np.geomspace(0.02, 4.0, 24)  # right answers lost for the whole network's cost
STARTS = (0.1, 0.5, 1.0, 2.0)
SWEEPS = 6
STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class SearchTable:
    """What a policy can do on a trace.

    Attributes:
        ranking: scores (E, N) and their order.
        right: whether each exit answers each sample rightly, (E, N).
        costs: of leaving at each exit; heads of exits without a threshold are left out.
    """

    ranking: Ranking
    right: NDArray[np.bool_]
    costs: Costs

    def exits(self, thresholds: Thresholds) -> NDArray[np.int64]:
        """The exit that answers each sample, (N,)."""
        return first_exit(self.ranking.scores, thresholds)

    def hits(self, thresholds: Thresholds) -> NDArray[np.bool_]:
        """Which samples are answered rightly, (N,)."""
        exits = self.exits(thresholds)
        return self.right[exits - 1, np.arange(len(exits))]

    def macs(self, thresholds: Thresholds) -> float:
        """Mean cost."""
        return mean_macs(self.exits(thresholds), self.costs.under(asked(thresholds)))


@dataclass(frozen=True)
class Found:
    """Thresholds, their mean cost in MACs and their accuracy on the calibration trace."""

    thresholds: Thresholds
    macs: float
    accuracy: float


def asked(thresholds: Sequence[float | None]) -> tuple[bool, ...]:
    """Which exits have a threshold, (E-1,)."""
    return tuple(threshold is not None for threshold in thresholds)


def search(table: SearchTable) -> list[Found]:
    """The upper hull of accuracy over cost, by rising cost."""
    exits = len(table.costs.cumulative)
    if exits == 1:
        return [_found(table, ())]
    return upper_front(_grid(table) if exits <= GRID_EXITS else _ascend_all(table))


def upper_front(candidates: Iterable[Found]) -> list[Found]:
    """Those that no cheaper one beats, by rising cost."""
    front: list[Found] = []
    for found in sorted(candidates, key=lambda found: (found.macs, -found.accuracy)):
        if not front or found.accuracy > front[-1].accuracy:
            front.append(found)
    return front


def clearly_better(table: SearchTable, thresholds: Thresholds, baseline: Thresholds) -> bool:
    """Whether one policy is right more often than another by over two standard errors of the paired difference."""
    one, other = table.hits(thresholds), table.hits(baseline)
    wins, losses = int((one & ~other).sum()), int((other & ~one).sum())
    return bool(wins - losses > STANDARD_ERRORS * np.sqrt(wins + losses))


def _found(table: SearchTable, thresholds: Thresholds) -> Found:
    return Found(thresholds, table.macs(thresholds), float(table.hits(thresholds).mean()))


def _grid(table: SearchTable) -> list[Found]:
    """Every combination of quantile thresholds, through cumulative histograms."""
    exits, samples = table.right.shape
    cuts = [_cut_points(table.ranking, k, GRID[exits]) for k in range(exits - 1)]
    # A sample is in bin b of exit k if it leaves there under thresholds b, b + 1, ...; thresholds rise boldly.
    bins = [
        np.searchsorted(-np.array(points), -table.ranking.scores[k], side="left") for k, points in enumerate(cuts)
    ]
    sizes = [len(points) for points in cuts]
    heads = table.costs.heads or (0,) * exits
    hits, cost, under_way = np.zeros(sizes), np.zeros(sizes), np.full([1] * len(sizes), float(samples))
    for k in range(exits):
        shape = [size if axis <= k else 1 for axis, size in enumerate(sizes)]
        hits += _leaving(bins, sizes, k, table.right[k].astype(np.float64)).reshape(shape)
        leaving = _leaving(bins, sizes, k, np.ones(samples)).reshape(shape)
        cost += table.costs.cumulative[k] * leaving
        if k < exits - 1:  # the first cut is "never leave here": whoever comes this far is spared the head
            never = (slice(None),) * k + (slice(0, 1),)
            cost[never] -= heads[k] * under_way
        under_way = under_way - leaving
    return _front_of_grid(cuts, hits / samples, cost / samples)


def _cut_points(ranking: Ranking, k: int, count: int) -> list[float]:
    """Thresholds from never (infinity) over quantiles to always, falling."""
    scores = ranking.scores[k, ranking.order[k]]
    scores = scores[~np.isnan(scores)]
    distinct = np.unique(scores)[::-1]
    middles = (distinct[:-1] + distinct[1:]) / 2
    if len(middles) > count:
        places = np.unique(np.searchsorted(-distinct, -scores[np.linspace(0, len(scores) - 1, count).astype(int)]))
        middles = middles[places[places < len(middles)]]
    return [np.inf, *middles.tolist(), ALWAYS]


def _leaving(bins: Sequence[NDArray[np.intp]], sizes: Sequence[int], k: int, weight: Floats) -> Floats:
    """Total weight that leaves at exit k (from 0), for every combination of the thresholds of exits 0..k."""
    last = k == len(bins)
    axes = [*bins[:k]] + ([] if last else [bins[k]])
    shape = [size + 1 for size in sizes[: len(axes)]]
    counts = np.zeros(shape)
    np.add.at(counts, tuple(axes), weight)
    for axis in range(k):  # stays: its bin lies behind the threshold's
        counts = np.flip(np.cumsum(np.flip(counts, axis), axis), axis)
        counts = np.take(counts, np.arange(1, shape[axis]), axis)
    if not last:
        counts = np.take(np.cumsum(counts, k), np.arange(sizes[k]), k)
    return counts


def _front_of_grid(cuts: Sequence[Sequence[float]], accuracy: Floats, macs: Floats) -> list[Found]:
    order = np.lexsort((-accuracy.ravel(), macs.ravel()))
    best = np.maximum.accumulate(accuracy.ravel()[order])
    first = order[np.concatenate([[True], best[1:] > best[:-1]])]
    found = []
    for place in first:
        index = np.unravel_index(place, accuracy.shape)
        values = [points[i] for points, i in zip(cuts, index, strict=True)]
        thresholds = tuple(None if np.isinf(value) else float(value) for value in values)
        found.append(Found(thresholds, float(macs.flat[place]), float(accuracy.flat[place])))
    return found


def _ascend_all(table: SearchTable) -> list[Found]:
    starts = [geometric(table.ranking, q) for q in STARTS]
    return [_found(table, _ascend(table, float(price), start)) for price, start in product(PRICES, starts)]


def _ascend(table: SearchTable, price: float, thresholds: Thresholds) -> Thresholds:
    """Coordinate ascent on right answers - price x cost / full cost."""
    current = list(thresholds)
    for _ in range(SWEEPS):
        before = list(current)
        for k in reversed(range(len(current))):
            current[k] = _best_threshold(table, price, current, k)
        if current == before:
            break
    return tuple(current)


def _best_threshold(table: SearchTable, price: float, thresholds: Sequence[float | None], k: int) -> float | None:
    """The threshold of exit k (from 0) that gains most over letting everybody go on, without its head."""
    ranking, full = table.ranking, table.costs.cumulative[-1]
    scores = ranking.scores
    with_head = [threshold is not None or exit_ == k for exit_, threshold in enumerate(thresholds)]
    value = table.right - price * np.asarray(table.costs.under(with_head))[:, None] / full
    reaches = np.ones(scores.shape[1], np.bool_)
    for earlier in range(k):
        reaches &= ~should_exit(scores[earlier], thresholds[earlier])
    later = value[-1].copy()
    for exit_ in range(len(thresholds) - 1, k, -1):
        sure = should_exit(scores[exit_], thresholds[exit_])
        later[sure] = value[exit_, sure]
    order = ranking.order[k]
    order = order[reaches[order]]
    falling = scores[k, order]
    order = order[~np.isnan(falling)]
    falling = falling[: len(order)]
    if not len(order):
        return None
    gains = np.cumsum(value[k, order] - later[order])
    ends = np.append(falling[1:] < falling[:-1], True)  # ties leave together
    gains[~ends] = -np.inf
    best = int(np.argmax(gains))
    head = table.costs.heads[k] if table.costs.heads else 0
    if gains[best] <= price * head / full * reaches.sum():
        return None
    return ALWAYS if best + 1 >= len(falling) else float((falling[best] + falling[best + 1]) / 2)
