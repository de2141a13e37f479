"""Events of a camera: changes of its steady label and of its state."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mexit.camera.frame import clock_s
from mexit.camera.prediction import CameraPrediction

EventKind = Literal["label-changed", "unsure", "sure-again", "camera-lost", "camera-back", "camera-frozen"]
UNSURE_S = 10.0  # time until the event "unsure", seconds


@dataclass(frozen=True)
class CameraEvent:
    """One event.

    Attributes:
        camera: name of the camera.
        kind: what happened. "label-changed": the steady label is another one than the last. "unsure": the camera has
            had no steady label for some time. "sure-again": it has one after "unsure". "camera-lost": no frames
            arrive. "camera-frozen": frames arrive, and all show the same picture. "camera-back": new pictures after
            "camera-lost" or "camera-frozen".
        time_s: time by the system's clock, seconds since 1970.
        label: the steady label; None if there is none, or if the answers say nothing about it (camera events).
        previous: the steady label before; None if there was none.
        seconds: how long the state before the event lasted: the previous label, the time without a steady label, or
            the time without new pictures. For "unsure" it is the time without a steady label so far. 0 if there was
            no state before.
    """

    camera: str
    kind: EventKind
    time_s: float
    label: str | None
    previous: str | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """JSON values; times are rounded to a millisecond."""
        return {**asdict(self), "time_s": round(self.time_s, 3), "seconds": round(self.seconds, 3)}


class EventDetector:
    """Finds the events in the answers and states of one camera. Not thread-safe."""

    def __init__(
        self, camera: str, unsure_s: float = UNSURE_S, *, live: bool = True, clock: Callable[[], float] = time.time
    ) -> None:
        """A detector before the first answer.

        Args:
            camera: name of the camera.
            unsure_s: seconds without a steady label until the event "unsure".
            live: whether the source is live; the durations of a recording are those of its timestamps.
            clock: returns the time of an event, seconds since 1970.
        """
        self._camera, self._unsure_s, self._live, self._clock = camera, unsure_s, live, clock
        self._label: str | None = None  # the last steady label
        self._label_since_s = 0.0
        self._unsure_since_s: float | None = None
        self._reported_unsure = False
        self._trouble_since_s: float | None = None
        self._trouble = ""

    def update(self, prediction: CameraPrediction) -> list[CameraEvent]:
        """The events of the next answer."""
        now_s, label = clock_s(prediction.time_s, prediction.captured_s, live=self._live), prediction.steady
        if label is None:
            return self._without_label(now_s)
        events = []
        if self._reported_unsure and self._unsure_since_s is not None:
            events.append(self._event("sure-again", label, self._label, now_s - self._unsure_since_s))
        self._unsure_since_s, self._reported_unsure = None, False
        if label != self._label:
            seconds = 0.0 if self._label is None else now_s - self._label_since_s
            events.append(self._event("label-changed", label, self._label, seconds))
            self._label, self._label_since_s = label, now_s
        return events

    def update_state(self, state: str, now_s: float) -> list[CameraEvent]:
        """The events of a state of the camera.

        Args:
            state: "lost", "frozen" or "live"; other states cause no event.
            now_s: time by `time.monotonic()`, seconds.
        """
        if state in ("lost", "frozen") and state != self._trouble:
            self._trouble = state
            self._trouble_since_s = now_s if self._trouble_since_s is None else self._trouble_since_s
            kind: EventKind = "camera-lost" if state == "lost" else "camera-frozen"
            return [self._event(kind, None, self._label, now_s - self._trouble_since_s)]
        if state == "live" and self._trouble_since_s is not None:
            seconds = now_s - self._trouble_since_s
            self._trouble, self._trouble_since_s = "", None
            return [self._event("camera-back", None, self._label, seconds)]
        return []

    def _without_label(self, now_s: float) -> list[CameraEvent]:
        if self._unsure_since_s is None:
            self._unsure_since_s = now_s
        seconds = now_s - self._unsure_since_s
        if self._reported_unsure or seconds < self._unsure_s:
            return []
        self._reported_unsure = True
        return [self._event("unsure", None, self._label, seconds)]

    def _event(self, kind: EventKind, label: str | None, previous: str | None, seconds: float) -> CameraEvent:
        return CameraEvent(self._camera, kind, self._clock(), label, previous, seconds)
