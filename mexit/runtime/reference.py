"""The reference of the engine: runs every row alone through every segment, and decides afterwards."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mexit.core.exit_policy import Policy, first_exit
from mexit.runtime.backends.base import Backend
from mexit.runtime.engine import Permit


def run_all_exits(backend: Backend, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits of every exit, (E, B, C) float32, of images (B, C, H, W) float32 in [0, 1]."""
    carried = backend.carry(images)
    logits = []
    for segment in backend.segments:
        carried, exit_logits = segment.run(carried)
        logits.append(exit_logits)
    return np.stack(logits)


def answer_slowly(
    backend: Backend,
    images: NDArray[np.float32],
    policy: Policy,
    classes: int,
    permit: Permit | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]:
    """Answer each image alone; `permit` as in `engine.answer`.

    Returns:
        The exit of each image, (B,), its probabilities, (B, C), and whether the answer is unsure, (B,).
    """
    scorer = policy.scorer(classes)
    logits = [run_all_exits(backend, images[row : row + 1]) for row in range(len(images))]
    scores = [scorer.score(one)[:, 0] for one in logits]
    by_policy = np.array([first_exit(one[:, None], policy.thresholds)[0] for one in scores], np.int64)
    exits = by_policy.copy()
    for k in range(2, len(backend.segments) + 1):
        continuing = np.flatnonzero(exits >= k)
        if permit is not None and len(continuing):
            exits[continuing[permit(k, len(continuing)) :]] = k - 1
    taken = np.array([one[k - 1] for one, k in zip(scores, exits, strict=True)])
    unsure = policy.unsure(exits, taken, exits == by_policy)
    probabilities = []
    for one, chosen in zip(logits, exits.tolist(), strict=True):
        state = scorer.start(1)
        for k in range(1, chosen + 1):
            state, exit_probabilities, _ = scorer.step(k, one[k - 1], state)
        probabilities.append(exit_probabilities[0])
    return exits, np.asarray(probabilities), np.zeros(len(images), np.bool_) if unsure is None else unsure
