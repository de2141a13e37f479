"""Topics and contents of MQTT messages."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from mexit.camera.prediction import CameraPrediction

ONLINE, OFFLINE = "online", "offline"


@dataclass(frozen=True)
class Topics:
    """Topics of one program and one of its cameras.

    Attributes:
        root: beginning of all topics.
        slug: name of the camera in topics.
    """

    root: str
    slug: str

    @property
    def program(self) -> str:
        """Whether the program runs: `online` or `offline`; the broker writes the latter when the program is lost."""
        return f"{self.root}/status"

    @property
    def camera(self) -> str:
        """State of the camera: `online`, `lost` or `frozen`."""
        return f"{self.root}/{self.slug}/status"

    @property
    def state(self) -> str:
        """The newest answer, JSON."""
        return f"{self.root}/{self.slug}/state"

    @property
    def event(self) -> str:
        """Events, JSON."""
        return f"{self.root}/{self.slug}/event"


def state_message(prediction: CameraPrediction) -> dict[str, Any]:
    """The state of a camera as JSON values: its steady label and the newest answer."""
    full = prediction.macs + prediction.saved_macs
    return {
        "camera": prediction.camera,
        "label": prediction.steady,
        "unsure": prediction.steady is None,
        "confidence": round(prediction.confidence, 4),
        "answer": prediction.label,
        "exit": prediction.exit,
        "reason": prediction.reason,
        "cost": round(prediction.macs / full, 4) if full else 0.0,
        "age_ms": round(prediction.age_ms, 1),
        "dropped": prediction.dropped,
        "frame_index": prediction.frame_index,
        "time_s": round(time.time() - prediction.age_ms / 1e3, 3),
    }
