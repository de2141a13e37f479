"""Frames and their counters."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

RGB = NDArray[np.uint8]
OnEvent = Callable[[str], None]


@dataclass(frozen=True)
class Frame:
    """One frame that has arrived and is not converted yet.

    Attributes:
        index: position among all frames that arrived, from 0.
        source: file or address, without credentials.
        time_s: timestamp in the video, seconds; None for images.
        captured_s: arrival by `time.monotonic()`, seconds.
        dropped: frames dropped before this one.
        load: returns the runtime's input: RGB (H, W, 3) uint8, or the bytes of an image file.
        to_rgb: converts that input to RGB (H, W, 3) uint8.
    """

    index: int
    source: str
    time_s: float | None
    captured_s: float
    dropped: int
    load: Callable[[], Any]
    to_rgb: Callable[[Any], RGB]


def clock_s(time_s: float | None, captured_s: float, *, live: bool) -> float:
    """The time by which intervals between frames are measured, seconds: in a recording, that of the recording.

    Args:
        time_s: timestamp of the frame in its video, or None.
        captured_s: arrival by `time.monotonic()`.
        live: whether the source is live.
    """
    return captured_s if live or time_s is None else time_s


@dataclass
class Counters:
    """Counts of the frames of one camera, updated by its reader and its pipeline.

    Once the source has ended or was closed, `arrived` = `answered` + `dropped` + `undecodable`.

    Attributes:
        arrived: all frames that arrived.
        answered: frames with an answer, those of `reused` included.
        reused: unchanged frames that got the answer before them.
        skipped: dropped by the reader to catch up with a camera.
        replaced: dropped for a newer frame, or because the source was closed.
        refused: dropped by the rate limiter, because of their deadline, or by an error of the engine.
        left_out: dropped by the trigger: without motion, or before the end of the interval.
        undecodable: damaged frames.
        reconnects: successful reconnections of a live source.
        link: "starting" before the first connection of a live source, then "live" or "lost".
    """

    arrived: int = 0
    answered: int = 0
    reused: int = 0
    skipped: int = 0
    replaced: int = 0
    refused: int = 0
    left_out: int = 0
    undecodable: int = 0
    reconnects: int = 0
    link: str = "starting"
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    @property
    def dropped(self) -> int:
        """Frames that could have been answered and were not."""
        return self.skipped + self.replaced + self.refused + self.left_out

    def count_arrived(self) -> int:
        """Count a frame; return its index."""
        self.arrived += 1
        return self.arrived - 1

    def count_undecodable(self, *, arrived: bool = True) -> None:
        """Count a frame that cannot be decoded; `arrived`: count its arrival too."""
        if arrived:  # the reader's thread alone writes this count
            self.arrived += 1
        with self._lock:  # the reader and the pipeline find damaged frames in different threads
            self.undecodable += 1

    def copy(self) -> Counters:
        """The present counts."""
        return replace(self)
