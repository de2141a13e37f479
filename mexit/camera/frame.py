"""What a reader hands on: a frame that has arrived and is not yet worth the work of converting it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RGB = NDArray[np.uint8]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Frame:
    """One frame.

    Attributes:
        index: its place among all frames that arrived, from 0.
        source: the file or address it came from, without credentials.
        time_s: its time stamp in the video; None for images.
        captured_s: when it arrived, `time.monotonic()`.
        dropped: frames before it that nobody will answer.
        load: gives what the runtime prepares: RGB (H, W, 3) uint8, or the bytes of an image file.
        show: turns that into RGB (H, W, 3) uint8.
    """

    index: int
    source: str
    time_s: float | None
    captured_s: float
    dropped: int
    load: Callable[[], Any]
    show: Callable[[Any], RGB]


@dataclass
class Counters:
    """What happened to frames that were not answered.

    Attributes:
        arrived: frames that came, whatever became of them.
        skipped: passed over by the reader, to catch up with a camera.
        replaced: by a newer one, before anybody took them.
        refused: by the rate limiter, which had no tokens for them.
        undecodable: damaged.
        reconnects: how often a live source came back.
    """

    arrived: int = 0
    skipped: int = 0
    replaced: int = 0
    refused: int = 0
    undecodable: int = 0
    reconnects: int = 0

    @property
    def dropped(self) -> int:
        """Good frames that nobody answered."""
        return self.skipped + self.replaced + self.refused

    def arrive(self) -> int:
        """Count a frame; gives its index."""
        self.arrived += 1
        return self.arrived - 1

    def lose(self) -> None:
        """Count a frame that cannot be decoded."""
        self.arrived += 1
        self.undecodable += 1

    def skip(self) -> None:
        """Count a frame that is passed over."""
        self.arrived += 1
        self.skipped += 1


def now() -> float:
    """The clock of `captured_s`: it never jumps."""
    return time.monotonic()
