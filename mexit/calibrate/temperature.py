"""Temperature scaling per exit, so that confidences match class probabilities (C. Guo et al., ICML 2017).

Temperatures change the displayed confidence and the weights of an ensemble; early exit itself depends on ranking
alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mexit.core.scores import Floats

LOWEST, HIGHEST = 0.05, 20.0
_HALVINGS = 50


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
