"""The slow oracle: every row alone, through every segment, decided afterwards. No shortcuts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mexit.core.policy import Policy, first_exit
from mexit.runtime.backends.base import Backend


def run_all_exits(backend: Backend, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits of every exit: images (B, C, H, W) float32 in [0, 1] to (E, B, C) float32."""
    carried = backend.carry(images)
    logits = []
    for segment in backend.segments:
        carried, exit_logits = segment.run(carried)
        logits.append(exit_logits)
    return np.stack(logits)


def answer_slowly(
    backend: Backend, images: NDArray[np.float32], policy: Policy, classes: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The exit (B,) and the probabilities (B, C) of each image."""
    exits, probabilities = [], []
    scorer = policy.scorer(classes)
    for row in range(len(images)):
        logits = run_all_exits(backend, images[row : row + 1])
        chosen = int(first_exit(scorer.score(logits), policy.thresholds)[0])
        state = scorer.start(1)
        for k in range(1, chosen + 1):
            state, exit_probabilities, _ = scorer.step(k, logits[k - 1], state)
        exits.append(chosen)
        probabilities.append(exit_probabilities[0])
    return np.asarray(exits, np.int64), np.asarray(probabilities)
