"""The answer of one frame of a camera."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mexit.runtime.prediction import Prediction


@dataclass(kw_only=True)
class CameraPrediction(Prediction):
    """A prediction with the data of its frame.

    Attributes:
        camera: name of the camera.
        source: file or address of the frame, without credentials.
        frame_index: position among all frames that arrived, from 0.
        time_s: timestamp in the video, seconds; None for images.
        captured_s: arrival by `time.monotonic()`, seconds.
        age_ms: from the arrival to the answer, milliseconds.
        dropped: frames dropped since the start, for newer ones, by the rate limiter or by the trigger.
        steady: the steady label after this answer, see `camera.votes`; None while it is unsure. Without votes it is
            `label`.
    """

    camera: str
    source: str
    frame_index: int
    time_s: float | None
    captured_s: float
    age_ms: float
    dropped: int
    steady: str | None

    def to_json(self) -> dict[str, Any]:
        """JSON values; times are rounded to a microsecond."""
        value = super().to_json()
        value["time_s"] = None if self.time_s is None else round(self.time_s, 6)
        value["captured_s"] = round(self.captured_s, 6)
        value["age_ms"] = round(self.age_ms, 3)
        return value
