"""Selection of the confidence score: the one that ranks correct above wrong predictions best.

The criterion is the AUROC of each exit that can decide (all but the last), averaged with the number of
correct-wrong pairs as weights, so that only ranks within an exit count; over clean and attacked data it is the mean.
Early exit depends on failure prediction, not on calibration (arXiv 2508.21495).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mexit.core.scores import MEASURES, Floats, Scorer
from mexit.core.trace import Trace

MIN_GAIN = 0.002  # AUROC that another score must gain over the simplest one


@dataclass(frozen=True)
class ScoreQuality:
    """How well one score ranks.

    Attributes:
        measure, ensemble: the score.
        auroc: one value per trace; NaN where an exit is never or always wrong.
    """

    measure: str
    ensemble: bool
    auroc: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over traces."""
        return float(np.mean(self.auroc))


def rank_scores(traces: Sequence[Trace], temperatures: tuple[float, ...]) -> list[ScoreQuality]:
    """The quality of every measure with and without ensemble, the simplest first."""
    return [
        ScoreQuality(measure, ensemble, tuple(_mean_auroc(trace, measure, ensemble, temperatures) for trace in traces))
        for ensemble in (False, True)
        for measure in MEASURES
    ]


def select_score(qualities: Sequence[ScoreQuality]) -> ScoreQuality:
    """The best score, or the first (the simplest) if no other is better by more than `MIN_GAIN`."""
    finite = [quality for quality in qualities if np.isfinite(quality.mean)]
    if not finite:
        return qualities[0]
    best = max(finite, key=lambda quality: quality.mean)
    simplest = qualities[0]
    return simplest if np.isfinite(simplest.mean) and best.mean - simplest.mean <= MIN_GAIN else best


def auroc(scores: Floats, correct: NDArray[np.bool_]) -> float:
    """Probability that a correct prediction scores above a wrong one, ties counting half; NaN without both kinds."""
    positives = int(correct.sum())
    negatives = len(correct) - positives
    if not positives or not negatives:
        return float("nan")
    usable = np.where(np.isnan(scores), -np.inf, scores)
    _, position, counts = np.unique(usable, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[position]
    return float((ranks[correct].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _mean_auroc(trace: Trace, measure: str, ensemble: bool, temperatures: tuple[float, ...]) -> float:
    assert trace.labels is not None
    scorer = Scorer(measure, ensemble, temperatures, trace.logits.shape[2])
    scores, predictions = scorer.answer(trace.logits)
    total, pairs = 0.0, 0
    for k in range(max(1, len(scores) - 1)):
        correct = predictions[k] == trace.labels
        weight = int(correct.sum()) * int((~correct).sum())
        if weight:
            total += weight * auroc(scores[k], correct)
            pairs += weight
    return total / pairs if pairs else float("nan")
