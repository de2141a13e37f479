"""Thresholds by MSDNet's geometric protocol (G. Huang et al., ICLR 2018, and its public code).

Exit k is to take a share proportional to q^k of the samples. At each exit in turn, the surest samples still
under way are admitted until its share is full; the threshold lies just below the last one admitted.

Two details differ from that code, on purpose: a threshold is the midpoint to the next distinct score, so that
a last-bit difference between engines flips nobody; and an exit whose share is empty gets None (never leave here)
while one that takes everybody left gets the lowest float, so that every sample with a score leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mexit.core.policy import Thresholds, should_exit
from mexit.core.scores import Floats

ALWAYS = float(np.finfo(np.float64).min)


@dataclass(frozen=True)
class Ranking:
    """Scores, sorted once for many budgets.

    Attributes:
        scores: (E, N).
        order: samples of each exit from surest to least sure, NaN last, (E, N).
    """

    scores: Floats
    order: NDArray[np.intp]

    @staticmethod
    def of(scores: Floats) -> Ranking:
        """Sort the scores (E, N) of every exit."""
        return Ranking(scores, np.argsort(-scores, axis=1, kind="stable"))


def shares(q: float, exits: int) -> Floats:
    """The share of each exit, proportional to q^k, (E,). q = 0: all at exit 1; infinity: all at the last."""
    if q == 0 or np.isinf(q):
        return np.asarray(np.eye(exits)[0 if q == 0 else exits - 1], np.float64)
    exponents = np.arange(1, exits + 1) * np.log(q)
    weights = np.exp(exponents - exponents.max())
    return np.asarray(weights / weights.sum())


def geometric(ranking: Ranking, q: float) -> Thresholds:
    """Thresholds for one q, (E-1,)."""
    exits, samples = ranking.scores.shape
    under_way = np.ones(samples, np.bool_)
    thresholds: list[float | None] = []
    for k, share in enumerate(shares(q, exits)[:-1]):
        order = ranking.order[k]
        falling = ranking.scores[k, order[under_way[order]]]
        threshold = take_surest(falling, int(np.floor(samples * share + 1e-9)))
        thresholds.append(threshold)
        under_way &= ~should_exit(ranking.scores[k], threshold)
    return tuple(thresholds)


def take_surest(falling: Floats, count: int) -> float | None:
    """The threshold that admits the first `count` of these falling scores (M,), and any that tie with the last."""
    if count <= 0:
        return None
    if count >= len(falling):
        return ALWAYS
    last = falling[count - 1]
    if np.isnan(last):
        return ALWAYS
    behind = count + int(np.searchsorted(-falling[count:], -last, side="right"))
    if behind >= len(falling) or np.isnan(falling[behind]):
        return ALWAYS
    return float((last + falling[behind]) / 2)
