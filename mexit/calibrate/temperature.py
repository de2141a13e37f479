"""One temperature per exit, so that confidences can be read as probabilities (C. Guo et al., ICML 2017).

It changes what people are shown and how an ensemble weighs its exits; it is not what makes early exit accurate.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mexit.core.scores import Floats

LOWEST, HIGHEST = 0.05, 20.0
_HALVINGS = 50


def fit(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[float, ...]:
    """Temperatures that minimise the negative log-likelihood: logits (E, N, C), labels (N,) to (E,).

    Samples with a logit that is not finite are left out. Where the likelihood has no optimum inside the bounds
    (every answer right, say), the nearest bound is taken.
    """
    return tuple(_fit_exit(exit_logits.astype(np.float64), labels) for exit_logits in logits)


def expected_calibration_error(confidence: Floats, right: NDArray[np.bool_], bins: int = 15) -> float:
    """Mean |accuracy - confidence| over equally wide bins, weighted by their samples: both (N,)."""
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    error = 0.0
    for place in np.unique(places):
        members = places == place
        error += members.mean() * abs(right[members].mean() - confidence[members].mean())
    return float(error)


def _fit_exit(logits: Floats, labels: NDArray[np.int64]) -> float:
    usable = np.isfinite(logits).all(axis=1)
    logits, labels = logits[usable], labels[usable]
    if not len(labels):
        return 1.0
    logits = logits - logits.max(axis=1, keepdims=True)
    target = logits[np.arange(len(labels)), labels].mean()
    # The likelihood is concave in 1 / temperature; halve the interval in which its slope changes sign.
    low, high = 1 / HIGHEST, 1 / LOWEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        weights = np.exp(middle * logits)
        expected = ((weights * logits).sum(axis=1) / weights.sum(axis=1)).mean()
        low, high = (low, middle) if expected > target else (middle, high)
    return float(2 / (low + high))
