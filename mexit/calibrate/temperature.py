"""Temperature scaling per exit, so that confidences match class probabilities (C. Guo et al., ICML 2017).

Temperatures change the displayed confidence and the weights of an ensemble; early exit itself depends on ranking
alone. The expected calibration error and the bins of a reliability diagram show how well confidence matches accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.scores import Floats, Scorer

LOWEST, HIGHEST = 0.05, 20.0
_HALVINGS = 50
DIAGRAM_BINS = 10

# Largest probability of each sample and its class, (N,) each.
TopProbability = tuple[Floats, NDArray[np.int64]]


def fit_temperatures(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[float, ...]:
    """Fit one temperature per exit by maximum likelihood.

    Samples with a non-finite logit are left out. Where the likelihood has no optimum between `LOWEST` and `HIGHEST`,
    for example because every prediction is correct, the nearer bound is returned.

    Args:
        logits: (E, N, C).
        labels: (N,).

    Returns:
        (E,).
    """
    return tuple(_fit_exit(exit_logits.astype(np.float64), labels) for exit_logits in logits)


def _fit_exit(logits: Floats, labels: NDArray[np.int64]) -> float:
    finite = np.isfinite(logits).all(axis=1)
    logits, labels = logits[finite], labels[finite]
    if not len(labels):
        return 1.0
    logits = logits - logits.max(axis=1, keepdims=True)
    target = logits[np.arange(len(labels)), labels].mean()
    # The likelihood is concave in 1 / temperature: bisect the zero of its slope.
    low, high = 1 / HIGHEST, 1 / LOWEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        weights = np.exp(middle * logits)
        expected = ((weights * logits).sum(axis=1) / weights.sum(axis=1)).mean()
        low, high = (low, middle) if expected > target else (middle, high)
    return float(2 / (low + high))


def expected_calibration_error(confidence: Floats, correct: NDArray[np.bool_], bins: int = 15) -> float:
    """Mean |accuracy - confidence| over bins of equal width, weighted by their samples: both (N,)."""
    bin_of = _bins(confidence, bins)
    error = 0.0
    for number in np.unique(bin_of):
        members = bin_of == number
        error += members.mean() * abs(correct[members].mean() - confidence[members].mean())
    return float(error)


def reliability(scorer: Scorer, logits: NDArray[np.float32], labels: NDArray[np.int64] | None) -> list[dict[str, Any]]:
    """Calibration errors and reliability diagrams of every exit before and after temperature scaling.

    Before: the softmax of the exit's own logits. After: the confidence that predictions report, with temperatures and,
    in an ensemble, the mean of the exits so far.

    Args:
        scorer: measure, ensemble and temperatures.
        logits: (E, N, C).
        labels: (N,); an empty list is returned without.
    """
    if labels is None:
        return []
    unscaled = Scorer(scorer.measure, False, (1.0,) * len(scorer.temperatures), scorer.classes)
    before, after = (_top_probabilities(one, logits) for one in (unscaled, scorer))
    return compare_reliability(before, after, labels)


def compare_reliability(
    before: Sequence[TopProbability], after: Sequence[TopProbability], labels: NDArray[np.int64]
) -> list[dict[str, Any]]:
    """The result of `reliability` from the confidences of every exit before and after temperature scaling."""
    rows = []
    for k, ((raw, raw_classes), (scaled, scaled_classes)) in enumerate(zip(before, after, strict=True), start=1):
        rows.append(
            {
                "exit": k,
                "ece_before": expected_calibration_error(raw, raw_classes == labels),
                "ece": expected_calibration_error(scaled, scaled_classes == labels),
                "bins": _diagram(scaled, scaled_classes == labels),
                "bins_before": _diagram(raw, raw_classes == labels),
            }
        )
    return rows


def _top_probabilities(scorer: Scorer, logits: NDArray[np.float32]) -> list[TopProbability]:
    _, classes, confidence = scorer.answer_exits(logits)
    return list(zip(confidence, classes, strict=True))


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
