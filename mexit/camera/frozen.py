"""Frozen pictures: a stream goes on, but shows the same picture."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mexit.camera.frame import RGB
from mexit.camera.triggers import small_copy

_LEAST_CHANGE = 1.0  # of a cell, in grey levels: less than the noise of a sensor, more than that of most encoders


class FrozenPicture:
    """Detects that pictures have stopped to change. Not thread-safe."""

    def __init__(self, seconds: float) -> None:
        """No picture yet.

        Args:
            seconds: time without a change after which the picture counts as frozen; 0: never.
        """
        self._seconds = seconds
        self._cells: NDArray[np.float32] | None = None
        self._since_s = 0.0

    def update(self, rgb: RGB, captured_s: float) -> bool:
        """Whether the picture is frozen.

        Args:
            rgb: the next picture, (H, W, 3) uint8.
            captured_s: its arrival by `time.monotonic()`, seconds.
        """
        if not self._seconds:
            return False
        cells, before = small_copy(rgb), self._cells
        if before is None or before.shape != cells.shape or float(np.abs(cells - before).max()) > _LEAST_CHANGE:
            self._cells, self._since_s = cells, captured_s
        return captured_s - self._since_s >= self._seconds
