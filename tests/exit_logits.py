"""Random logits of three exits and policies over them, shared by the tests of scores and of soft policies."""

from __future__ import annotations

import numpy as np

from mexit.core.exit_policy import Policy

EXITS, CLASSES = 3, 5
TEMPERATURES = (1.0, 0.5, 2.5)
# Thresholds at which some of the random rows leave at every exit.
THRESHOLDS = {"max-probability": 4.0, "margin": 4.0, "entropy": -0.1, "agreement": 1.96}


def example_policy(measure: str = "max-probability", ensemble: bool = False, *, closed: tuple[int, ...] = ()) -> Policy:
    """A policy with the same threshold at every exit but those in `closed`, which have none."""
    thresholds = tuple(None if k in closed else THRESHOLDS[measure] for k in range(1, EXITS))
    return Policy(measure, ensemble, TEMPERATURES, thresholds)


def example_logits(kind: str) -> np.ndarray:
    """Logits (E, 200, C) of one kind: "random", "extreme" (huge, tiny, infinite, equal) or "NaN"."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (EXITS, 200, CLASSES)).astype(np.float32)
    if kind == "extreme":
        logits *= 10.0 ** rng.integers(-30, 30, (1, 200, 1))
        logits[:, ::7] = 0
        logits[:, ::11, 2] = -np.inf
    if kind == "NaN":
        logits[0, ::3, 1] = np.nan
        logits[1, ::4] = np.nan
        logits[2, ::5, 0] = np.inf
    return logits
