"""Does the exported artifact say what the network says? Every exit, on real images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from mexit.errors import BackendError
from mexit.models import MultiExit

TOLERANCE = 1e-4

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def largest_difference(model: MultiExit, run: Run, images: NDArray[np.float32]) -> list[float]:
    """The largest |difference| of a logit at each exit, (E,).

    Args:
        model: the network that was exported.
        run: images (B, C, H, W) to logits (E, B, C) of the exported segments, opened in the engine.
        images: real ones, (B, C, H, W) float32 in [0, 1].

    Raises:
        BackendError: an exit differs by more than `TOLERANCE` (relative to its largest logit, if above 1).
    """
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(images)).numpy()
    found = run(images)
    differences = np.abs(found - expected).max(axis=(1, 2))
    allowed = TOLERANCE * np.maximum(1.0, np.abs(expected).max(axis=(1, 2)))
    for k, (difference, bound) in enumerate(zip(differences, allowed, strict=True), start=1):
        if not difference <= bound:
            raise BackendError(
                f"exit {k} of the exported network differs from torch by {difference:.2e} (> {bound:.0e})"
            )
    return [float(difference) for difference in differences]
