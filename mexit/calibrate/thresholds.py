"""Thresholds by MSDNet's geometric protocol (G. Huang et al., ICLR 2018, and its public code).

Exit k is to take a share proportional to q^k of the samples. At each exit in turn, the surest samples still
under way are admitted until its share is full; the threshold lies just below the last one admitted.

Two details differ from that code, on purpose: a threshold is the midpoint to the next distinct score, so that
a last-bit difference between engines flips nobody; and an exit whose share is empty gets None (never leave here)
while one that takes everybody left gets the lowest float, so that every sample with a score leaves.
"""

from __future__ import annotations

import numpy as np

from mexit.core.confidence import Floats
from mexit.core.policy import Thresholds, is_sure

ALWAYS = float(np.finfo(np.float64).min)


def shares(q: float, exits: int) -> Floats:
    """The share of each exit, proportional to q^k, (E,). q = 0: all at exit 1; infinity: all at the last."""
    if q == 0 or np.isinf(q):
        return np.asarray(np.eye(exits)[0 if q == 0 else exits - 1], np.float64)
    exponents = np.arange(1, exits + 1) * np.log(q)
    weights = np.exp(exponents - exponents.max())
    return np.asarray(weights / weights.sum())


def geometric(scores: Floats, q: float) -> Thresholds:
    """Thresholds for one q: scores (E, N) to (E-1,)."""
    exits, samples = scores.shape
    under_way = np.ones(samples, np.bool_)
    thresholds: list[float | None] = []
    for k, share in enumerate(shares(q, exits)[:-1]):
        threshold = take_surest(scores[k, under_way], int(np.floor(samples * share + 1e-9)))
        thresholds.append(threshold)
        under_way &= ~is_sure(scores[k], threshold)
    return tuple(thresholds)


def take_surest(scores: Floats, count: int) -> float | None:
    """The threshold that admits the `count` surest of these scores (M,), and any that tie with the last."""
    comparable = np.sort(scores[~np.isnan(scores)])[::-1]
    if count <= 0 or not len(comparable):
        return None
    if count >= len(scores):
        return ALWAYS
    last = comparable[min(count, len(comparable)) - 1]
    below = comparable[comparable < last]
    return float((last + below[0]) / 2) if len(below) else ALWAYS
