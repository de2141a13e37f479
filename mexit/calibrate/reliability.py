"""Expected calibration error and reliability diagrams: how well confidence matches accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.scores import Floats, Scorer
from mexit.core.trace import Trace

DIAGRAM_BINS = 10


def expected_calibration_error(confidence: Floats, correct: NDArray[np.bool_], bins: int = 15) -> float:
    """Mean |accuracy - confidence| over bins of equal width, weighted by their samples: both (N,)."""
    bin_of = _bins(confidence, bins)
    error = 0.0
    for number in np.unique(bin_of):
        members = bin_of == number
        error += members.mean() * abs(correct[members].mean() - confidence[members].mean())
    return float(error)


def reliability(scorer: Scorer, trace: Trace) -> list[dict[str, Any]]:
    """Calibration errors of every exit before and after temperature scaling, and the bins of its diagram.

    Args:
        scorer: measure, ensemble and temperatures.
        trace: with labels; an empty list is returned without.
    """
    if trace.labels is None:
        return []
    unscaled = Scorer(scorer.measure, False, (1.0,) * len(scorer.temperatures), scorer.classes)
    before, after = (_confidences(one, trace) for one in (unscaled, scorer))
    return [
        {
            "exit": k,
            "ece_before": expected_calibration_error(*before[k - 1]),
            "ece": expected_calibration_error(*after[k - 1]),
            "bins": _diagram(*after[k - 1]),
        }
        for k in range(1, len(trace.logits) + 1)
    ]


def _confidences(scorer: Scorer, trace: Trace) -> list[tuple[Floats, NDArray[np.bool_]]]:
    """For every exit the confidence of each sample and whether its prediction is correct, (N,) each."""
    assert trace.labels is not None
    state = scorer.start(len(trace.labels))
    result = []
    for k, logits in enumerate(trace.logits, start=1):
        state, probabilities, _ = scorer.step(k, logits, state)
        confidence = np.nan_to_num(probabilities.max(axis=1))
        result.append((confidence, probabilities.argmax(axis=1) == trace.labels))
    return result


def _diagram(confidence: Floats, correct: NDArray[np.bool_]) -> list[dict[str, float]]:
    bin_of = _bins(confidence, DIAGRAM_BINS)
    return [
        {
            "confidence": float(confidence[bin_of == number].mean()),
            "accuracy": float(correct[bin_of == number].mean()),
            "n": int((bin_of == number).sum()),
        }
        for number in np.unique(bin_of)
    ]


def _bins(confidence: Floats, bins: int) -> NDArray[np.int64]:
    """The bin of each sample, (N,)."""
    return np.minimum((confidence * bins).astype(np.int64), bins - 1)
