"""Which frames run through the network: every frame, those with motion, or one per interval; and unchanged pictures.

Motion is the share of cells of a small copy of the picture that differ from the picture of the last answer by more
than noise does. A picture without such a cell is unchanged. The level of the noise follows the differences between
frames in steps of a fixed ratio, up or down by the sign of the error, as in sigma-delta background estimation
(A. Manzanera and J. C. Richefeu, A new motion detection algorithm based on sigma-delta background estimation, Pattern
Recognition Letters 28, 2007), here for the whole picture and on a logarithmic scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mexit.camera.frame import RGB
from mexit.errors import UsageError

Decision = Literal["run", "reuse", "skip"]
RUNS = ("every-frame", "motion", "interval")
_CELLS = 64  # cells along the longest side of a large picture
_SAMPLES = 4  # pixels across a cell that are read; 256 along the longest side are about what a network sees
_LEAST_CHANGE = 4.0  # of a cell, in grey levels: more than a video codec changes in a still picture
_SIGMAS = 5.0  # with Gaussian noise, a cell of a still picture differs by more once in 1.7 million times
_QUARTILE = 0.3186  # quartile of the absolute value of a standard normal variable
_NOISE_RATIO = 1.02  # step of the noise level per frame
_NOISE_RANGE = (0.1, 4.0)  # grey levels; the upper end keeps a picture that moves all the time from being called still


@dataclass(frozen=True)
class TriggerSettings:
    """Which frames run through the network.

    Attributes:
        run: "every-frame"; "motion": frames whose picture has changed; "interval": one frame per `interval_s`.
        interval_s: seconds between two answers of "interval".
        motion: share of the picture that has to change for "motion", from 0 to 1.
        reuse: whether a frame with an unchanged picture gets the last answer again; None: on live sources.
        reuse_s: longest time for which an answer stands for the pictures after it, seconds; of "motion" and of reused
            answers.
    """

    run: str = "every-frame"
    interval_s: float = 2.0
    motion: float = 0.01
    reuse: bool | None = None
    reuse_s: float = 10.0

    def __post_init__(self) -> None:
        if self.run not in RUNS:
            raise UsageError(f"run must be {', '.join(RUNS[:-1])} or {RUNS[-1]}, found {self.run}")
        for name, value in (("interval", self.interval_s), ("reuse_s", self.reuse_s)):
            if not 0 < value < math.inf:
                raise UsageError(f"{name} must be above 0 seconds, found {value:g}")
        if not 0 <= self.motion < 1:
            raise UsageError(f"motion must be a share of the picture from 0 to below 1, found {self.motion:g}")


class Trigger:
    """Decides for each frame of one camera whether the network runs. Not thread-safe."""

    def __init__(self, settings: TriggerSettings, *, live: bool = True) -> None:
        """A trigger before the first frame, which always runs.

        Args:
            settings: its settings.
            live: whether the source is live, which reuses answers unless the settings say otherwise.
        """
        self._settings = settings
        self._reuse = live if settings.reuse is None else settings.reuse
        self._motion = _MotionMeter()
        self._ran_s: float | None = None  # time of the last frame that ran
        self._last_s = -math.inf
        self._due_s = 0.0  # of "interval"
        self._repeatable = False

    def should_run(self, rgb: RGB, now_s: float) -> Decision:
        """Decide about the next frame.

        Args:
            rgb: the region of interest, (H, W, 3) uint8.
            now_s: time of the frame, seconds; a time before that of the last frame starts a new recording.

        Returns:
            "run": classify the frame, and call `answered`. "reuse": repeat the last answer, and call `reused`. "skip":
            the frame gets no answer.
        """
        settings = self._settings
        on_motion = settings.run == "motion"
        motion = self._motion.measure(rgb) if on_motion or self._reuse else 1.0
        before_s, self._last_s = self._last_s, now_s
        if self._ran_s is None or now_s < before_s:
            self._ran_s, self._due_s = None, now_s
            return "run"
        if settings.run == "interval" and now_s < self._due_s:
            return "skip"
        if not self._repeatable or now_s - self._ran_s >= settings.reuse_s:
            return "run"
        if on_motion:
            return "run" if motion > settings.motion else "skip"
        return "run" if motion > 0 else "reuse"

    def answered(self, now_s: float, *, repeatable: bool = True) -> None:
        """The last frame ran and has an answer.

        Args:
            now_s: time of the frame, seconds.
            repeatable: whether the answer may stand for unchanged pictures.
        """
        self._ran_s, self._repeatable = now_s, repeatable
        self._motion.answered()
        self._advance(now_s)

    def reused(self, now_s: float) -> None:
        """The last frame got the answer of an earlier one. `now_s` is its time, seconds."""
        self._advance(now_s)

    def _advance(self, now_s: float) -> None:
        """Set when the next answer is due: in a regular rhythm, but not before now."""
        interval_s = self._settings.interval_s
        self._due_s = (self._due_s if now_s - self._due_s < interval_s else now_s) + interval_s


class _MotionMeter:
    """Compares pictures with that of the last answer."""

    def __init__(self) -> None:
        self._answered: NDArray[np.float32] | None = None
        self._last: NDArray[np.float32] | None = None
        self._noise = 1.0  # standard deviation of the difference of a cell between two frames, grey levels

    def measure(self, rgb: RGB) -> float:
        """Share of the cells that have changed since the last answer; 1 without an answer for this size of picture."""
        cells, before = small_copy(rgb), self._last
        self._last = cells
        if before is None or before.shape != cells.shape:
            self._answered = None
            return 1.0
        self._follow_noise(np.abs(cells - before))
        if self._answered is None:
            return 1.0
        changed = np.abs(cells - self._answered) > max(_LEAST_CHANGE, _SIGMAS * self._noise)
        return float(changed.any(axis=2).mean())

    def answered(self) -> None:
        """The last picture has an answer."""
        self._answered = self._last

    def _follow_noise(self, differences: NDArray[np.float32]) -> None:
        """Move the noise level; the lower quartile measures noise while up to three quarters of the picture move."""
        louder = float(np.quantile(differences, 0.25)) / _QUARTILE > self._noise
        noise = self._noise * (_NOISE_RATIO if louder else 1 / _NOISE_RATIO)
        self._noise = min(max(noise, _NOISE_RANGE[0]), _NOISE_RANGE[1])


def small_copy(rgb: RGB) -> NDArray[np.float32]:
    """Mean colours of cells of equal size, (h, w, 3). Colour matters: a lamp may change nothing else."""
    longest = max(rgb.shape[:2])
    side = min(_SAMPLES, max(1, longest // _CELLS))  # of a cell, in samples
    cells = [
        max(1, size * _CELLS // longest if longest > _CELLS * _SAMPLES else size // side) for size in rgb.shape[:2]
    ]
    rows, columns = (
        (np.arange(count * side) * 2 + 1) * size // (2 * count * side)
        for count, size in zip(cells, rgb.shape[:2], strict=True)
    )
    return _group_sums(_group_sums(rgb, rows, side, 0), columns, side, 1) / np.float32(side * side)


def _group_sums(values: NDArray[Any], indices: NDArray[np.intp], size: int, axis: int) -> NDArray[np.float32]:
    """Sums over groups of `size` indices along an axis. Ten times as fast as a mean over a reshaped array."""
    sums = values.take(indices[::size], axis).astype(np.float32)
    for k in range(1, size):
        sums += values.take(indices[k::size], axis)
    return sums
