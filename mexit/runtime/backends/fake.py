"""A backend without a network that returns given logits, for tests.

Image i must hold the number i / 2**20 in its first pixel (`images_for`), so that the backend recognises a row after
batches were split, merged and compacted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mexit.runtime.backends.base import HostCarried

_STEP = 2.0**-20


class FakeSegment:
    """Returns `logits[i]`, (C,), for row i.

    Attributes:
        rows_run: number of rows that it ran.
    """

    def __init__(self, logits: NDArray[np.float32]) -> None:
        """`logits`: (N, C) float32."""
        self.logits = logits
        self.rows_run = 0

    def run(self, carried: HostCarried) -> tuple[HostCarried, NDArray[np.float32]]:
        self.rows_run += carried.rows
        first_pixels = carried.arrays[0].reshape(carried.rows, -1)[:, 0]
        return carried, self.logits[np.rint(first_pixels / _STEP).astype(np.int64)]


class FakeBackend:
    """A network that returns given logits."""

    engine = "fake"
    precision = "fp32"
    variant = "fp32"

    def __init__(self, logits: NDArray[np.float32], *, static: bool = False) -> None:
        """Return given logits.

        Args:
            logits: (E, N, C) float32.
            static: whether there is a static network, which returns the logits of the last exit.
        """
        self.segments = tuple(FakeSegment(exit_logits) for exit_logits in logits)
        self.static = FakeSegment(logits[-1]) if static else None

    def carry(self, images: NDArray[np.float32]) -> HostCarried:
        return HostCarried([images])


def images_for(rows: NDArray[np.integer], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Images (B, C, H, W) that `FakeSegment` recognises as the given rows, (B,)."""
    images = np.zeros((len(rows), *shape), np.float32)
    images[:, 0, 0, 0] = rows * _STEP
    return images
