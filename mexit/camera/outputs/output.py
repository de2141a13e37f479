"""What every output of a camera does."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mexit.camera.events import CameraEvent
from mexit.camera.frame import RGB
from mexit.camera.prediction import CameraPrediction


class Output(Protocol):
    """Takes the answered frames and the events of cameras in order, and is closed once, also after Ctrl-C."""

    @property
    def name(self) -> str:
        """What reports call it: jsonl, events, video, unsure, mqtt or webhook."""

    @property
    def lost(self) -> int:
        """Pictures or messages that were taken and not delivered."""

    def write(self, frame: RGB, prediction: CameraPrediction) -> None:
        """Take a frame, RGB (H, W, 3) uint8, and its prediction."""

    def event(self, event: CameraEvent) -> None:
        """Take an event."""

    def close(self) -> Path | None:
        """Finish; return the written file, folder or pattern of files, or None if there is none."""


class FileOutput:
    """Base of the outputs that write in the camera's own thread: a failure ends the run, so nothing is lost."""

    @property
    def lost(self) -> int:
        """Always 0."""
        return 0

    def event(self, event: CameraEvent) -> None:
        """Ignore the event."""
