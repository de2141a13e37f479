"""The inputs of a bundle's single file (`export.nested_if`) that stand for a policy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.policy import Policy
from mexit.errors import UsageError

MEASURES = ("max-probability", "margin", "entropy")  # the input `measure` is a place in it
OUTPUTS = ("logits", "probabilities", "exit", "score")


def feeds(policy: Policy) -> dict[str, NDArray[Any]]:
    """`thresholds` (E-1,) and `temperatures` (E,) float64, `measure` () int64 and `ensemble` () bool.

    Raises:
        UsageError: a measure that the file cannot compute.
    """
    if policy.measure not in MEASURES:
        raise UsageError(
            f"the single file cannot score by {policy.measure}: mexit calibrate --measure with one of "
            f"{', '.join(MEASURES)} sets thresholds that it can take"
        )
    return {
        "thresholds": np.array([np.nan if value is None else value for value in policy.thresholds], np.float64),
        "temperatures": np.array(policy.temperatures, np.float64),
        "measure": np.array(MEASURES.index(policy.measure), np.int64),
        "ensemble": np.array(policy.ensemble, np.bool_),
    }
