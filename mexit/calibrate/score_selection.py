"""Which confidence to decide by: the one that ranks right above wrong answers best.

AUROC of each exit that can decide (all but the last), pooled with the number of right-wrong pairs as weights, so
that only ranks within an exit count; the mean of clean and attacked data where both are there. Failure prediction,
not calibration, is what early exit lives on (arXiv 2508.21495).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mexit.core.scores import MEASURES, Floats, Scorer
from mexit.core.trace import Trace

WORTH = 0.002  # a smaller gain does not move us from the simplest score


@dataclass(frozen=True)
class ScoreQuality:
    """How well one score ranks.

    Attributes:
        measure, ensemble: the score.
        auroc: one value a trace, in the order given; NaN where an exit is never or always wrong.
    """

    measure: str
    ensemble: bool
    auroc: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over traces."""
        return float(np.mean(self.auroc))


def rank_scores(
    traces: Sequence[Trace], temperatures: tuple[float, ...], *, ensembles: Sequence[bool] = (False, True)
) -> list[ScoreQuality]:
    """Every measure with and without ensemble, simplest first."""
    return [
        ScoreQuality(measure, ensemble, tuple(_pooled(trace, measure, ensemble, temperatures) for trace in traces))
        for ensemble in ensembles
        for measure in MEASURES
    ]


def choose(found: Sequence[ScoreQuality]) -> ScoreQuality:
    """The best one, or the first (the simplest) if none is better by more than `WORTH`."""
    known = [quality for quality in found if np.isfinite(quality.mean)]
    if not known:
        return found[0]
    best = max(known, key=lambda quality: quality.mean)
    return found[0] if np.isfinite(found[0].mean) and best.mean - found[0].mean <= WORTH else best


def auroc(scores: Floats, right: NDArray[np.bool_]) -> float:
    """Probability that a right answer scores above a wrong one, ties counting half; NaN without both kinds."""
    positives = int(right.sum())
    negatives = len(right) - positives
    if not positives or not negatives:
        return float("nan")
    usable = np.where(np.isnan(scores), -np.inf, scores)
    distinct, place, counts = np.unique(usable, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    del distinct
    return float((ranks[right].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _pooled(trace: Trace, measure: str, ensemble: bool, temperatures: tuple[float, ...]) -> float:
    assert trace.labels is not None
    scorer = Scorer(measure, ensemble, temperatures, trace.logits.shape[2])
    scores, predictions = scorer.answer(trace.logits)
    total, pairs = 0.0, 0
    for k in range(max(1, len(scores) - 1)):
        right = predictions[k] == trace.labels
        weight = int(right.sum()) * int((~right).sum())
        if weight:
            total += weight * auroc(scores[k], right)
            pairs += weight
    return total / pairs if pairs else float("nan")
