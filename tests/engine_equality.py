"""When two engines say the same: the rule that every engine of the catalogue is held to, on real images.

ONNX Runtime computes the reference on the same variant, one row at a time. Its own fast path must equal it to
the last bit. Another engine may differ by a tolerance of its precision; a row may then leave at another exit only
where its score is so close to a threshold that the tolerance explains it. Neither the order of rows nor their
neighbours in a batch change an answer by more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mexit.core.exit_policy import Policy
from mexit.runtime.backends.base import Backend
from mexit.runtime.engine import answer
from mexit.runtime.reference import answer_slowly, run_all_exits

# Largest |difference| of a logit from ONNX Runtime's, as a share of the largest logit.
TOLERANCES = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 5e-3, "int8": 3e-2}
BATCHES = (1, 3, 64)
MEASURE = "max-probability"


@dataclass(frozen=True)
class Equality:
    """What was found.

    Attributes:
        tolerance, difference: of a logit; allowed, and the largest found.
        neighbours: the largest change of a logit by other rows in the batch.
        moved, rows: how many rows left at another exit, of how many.
    """

    tolerance: float
    difference: float
    neighbours: float
    moved: int
    rows: int


def hold(backend: Backend, reference: Backend, images: NDArray[np.float32]) -> Equality:
    """Assert the rule.

    Args:
        backend: under test.
        reference: ONNX Runtime with the same variant.
        images: real ones, (B, C, H, W) float32 in [0, 1].
    """
    slow = np.concatenate([run_all_exits(reference, images[row : row + 1]) for row in range(len(images))], axis=1)
    exact = backend.engine == reference.engine
    tolerance = 0.0 if exact else TOLERANCES[backend.precision] * float(np.abs(slow).max())
    fast = run_all_exits(backend, images)
    difference = float(np.abs(fast - slow).max())
    assert difference <= tolerance, f"logits differ by {difference:.2e}, {tolerance:.2e} are allowed"
    neighbours = _largest_change_by_neighbours(backend, images, fast)
    assert neighbours <= tolerance, f"other rows change a logit by {neighbours:.2e}, {tolerance:.2e} are allowed"
    policy = _mixed_policy(slow)
    moved = _moved(backend, reference, images, policy, slow, tolerance)
    return Equality(tolerance, difference, neighbours, moved, len(images))


def _largest_change_by_neighbours(backend: Backend, images: NDArray[np.float32], whole: NDArray[np.float32]) -> float:
    order = np.random.default_rng(0).permutation(len(images))
    found = [np.abs(run_all_exits(backend, images[order]) - whole[:, order]).max()]
    for batch in BATCHES:
        for start in range(0, min(len(images), 4 * batch), batch):
            part = run_all_exits(backend, images[start : start + batch])
            found.append(np.abs(part - whole[:, start : start + batch]).max())
    return float(max(found))


def _mixed_policy(logits: NDArray[np.float32]) -> Policy:
    """A third of all rows is sure enough at each exit but the last; thresholds lie midway between two scores."""
    exits = len(logits)
    scores = Policy(MEASURE, False, (1.0,) * exits, (None,) * (exits - 1)).scorer(logits.shape[2]).score(logits)
    thresholds = []
    for row in np.sort(scores[:-1], axis=1):
        place = 2 * len(row) // 3
        thresholds.append(float((row[place - 1] + row[place]) / 2))
    return Policy(MEASURE, False, (1.0,) * exits, tuple(thresholds))


def _moved(
    backend: Backend,
    reference: Backend,
    images: NDArray[np.float32],
    policy: Policy,
    logits: NDArray[np.float32],
    tolerance: float,
) -> int:
    """How many rows left at another exit; each must have been within the tolerance's effect of a threshold."""
    classes = logits.shape[2]
    found = answer(backend, images, policy, classes)
    exits, probabilities, _ = answer_slowly(reference, images, policy, classes)
    assert len(set(exits.tolist())) == len(logits), "the images must use every exit"
    if tolerance == 0:
        np.testing.assert_array_equal(found.probabilities, probabilities)
    # The score is z_max - logsumexp(others): each of the two terms moves by at most the tolerance of a logit.
    scores = policy.scorer(classes).score(logits)
    thresholds = np.array(policy.thresholds, np.float64)[:, None]
    close = np.abs(scores[:-1] - thresholds) <= 2 * tolerance
    moved = np.flatnonzero(found.exits != exits)
    for row in moved:
        first = int(min(found.exits[row], exits[row]))
        assert close[first - 1, row], f"row {row} left at exit {found.exits[row]} instead of {exits[row]}"
    return len(moved)
