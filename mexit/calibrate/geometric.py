"""Thresholds by MSDNet's geometric protocol (G. Huang et al., ICLR 2018, and its public code).

The quota of exit k is a share of the samples proportional to q^k. At each exit in turn, the remaining samples with
the highest scores are admitted until the quota is reached; the threshold lies just below the last admitted score.

Two details differ from that code. A threshold is the midpoint to the next distinct score, so that differences in the
last bit between engines change no decision. An exit with an empty quota has the threshold None (no sample exits
there), and an exit whose quota covers all remaining samples has the lowest float, which every score but NaN reaches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mexit.core.exit_policy import LOWEST, Thresholds, should_exit
from mexit.core.scores import Floats

ALWAYS = LOWEST


@dataclass(frozen=True)
class Ranking:
    """Scores, sorted once for many budgets.

    Attributes:
        scores: (E, N).
        order: samples of each exit by falling score, NaN last, (E, N).
    """

    scores: Floats
    order: NDArray[np.intp]

    @staticmethod
    def of(scores: Floats) -> Ranking:
        """Sort the scores (E, N) of every exit."""
        return Ranking(scores, np.argsort(-scores, axis=1, kind="stable"))


def exit_shares(q: float, exits: int) -> Floats:
    """The share of each exit, proportional to q^k, (E,). q = 0: all at exit 1; infinity: all at the last exit."""
    if q == 0 or np.isinf(q):
        return np.asarray(np.eye(exits)[0 if q == 0 else exits - 1], np.float64)
    exponents = np.arange(1, exits + 1) * np.log(q)
    weights = np.exp(exponents - exponents.max())
    return np.asarray(weights / weights.sum())


def geometric(ranking: Ranking, q: float) -> Thresholds:
    """Thresholds for one q, (E-1,)."""
    exits, samples = ranking.scores.shape
    remaining = np.ones(samples, np.bool_)
    thresholds: list[float | None] = []
    for k, share in enumerate(exit_shares(q, exits)[:-1]):
        order = ranking.order[k]
        falling = ranking.scores[k, order[remaining[order]]]
        threshold = admit_highest(falling, int(np.floor(samples * share + 1e-9)))
        thresholds.append(threshold)
        remaining &= ~should_exit(ranking.scores[k], threshold)
    return tuple(thresholds)


def admit_highest(falling: Floats, count: int) -> float | None:
    """The threshold that admits the first `count` of these falling scores (M,), and any that tie with the last."""
    if count <= 0:
        return None
    if count >= len(falling):
        return ALWAYS
    last = falling[count - 1]
    if np.isnan(last):
        return ALWAYS
    following = count + int(np.searchsorted(-falling[count:], -last, side="right"))
    if following >= len(falling) or np.isnan(falling[following]):
        return ALWAYS
    return float((last + falling[following]) / 2)
