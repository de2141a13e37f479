"""One camera of a fleet: a thread that reads its source, answers its frames and writes its outputs."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from operator import methodcaller
from pathlib import Path
from typing import Any

from mexit.camera.events import CameraEvent, EventDetector
from mexit.camera.frame import RGB, Counters
from mexit.camera.identify_source import identify_source
from mexit.camera.live_stream import LiveSettings
from mexit.camera.outputs.output import Output
from mexit.camera.parse_source import Source
from mexit.camera.pipeline import classify_frames
from mexit.camera.prediction import CameraPrediction
from mexit.camera.steady import SteadySettings
from mexit.camera.web import AccessRefused
from mexit.errors import MexitError, MissingExtra, NotFound, UsageError
from mexit.runtime.prediction import Prediction
from mexit.runtime.request import RequestOptions
from mexit.runtime.stats import RuntimeStats

STARTING, LIVE, LOST, FROZEN, ENDED = "starting", "live", "lost", "frozen", "ended"
_FINAL = (AccessRefused, MissingExtra, NotFound, UsageError)  # no later attempt will do better


@dataclass(frozen=True)
class Camera:
    """A camera to run.

    Attributes:
        name: its name; distinct in a fleet.
        source: its parsed source.
        request: options of each frame's request: budget, deadline_ms.
        steady: region, trigger and votes.
        unsure_s: seconds without a steady label until the event "unsure".
        frozen_s: seconds without a change after which the picture of a live source counts as frozen; 0: never.
        live: time-outs and delays of a live source.
        keep_trying: whether a source that fails is opened again and again, and `live.connect_attempts` does not count.
        limit: number of answers after which it ends; None: no limit.
        open_outputs: opens what takes its answers and events, and is closed with the camera; the argument `live` says
            whether the source is live.
        shared: outputs that other cameras write to as well; closed by their owner.
    """

    name: str
    source: Source
    request: RequestOptions = field(default_factory=RequestOptions)
    steady: SteadySettings = field(default_factory=SteadySettings)
    unsure_s: float = 10.0
    frozen_s: float = 60.0
    live: LiveSettings = field(default_factory=LiveSettings)
    keep_trying: bool = True
    limit: int | None = None
    open_outputs: Callable[..., Sequence[Output]] = lambda **_: ()
    shared: Sequence[Output] = ()


@dataclass(frozen=True)
class Listeners:
    """Called by the threads of cameras.

    Attributes:
        on_result: with each answer, after it was written.
        on_message: with a message about a source.
        on_event: with each event, after it was written.
    """

    on_result: Callable[[CameraPrediction], None]
    on_message: Callable[[str], None]
    on_event: Callable[[CameraEvent], None]


class CameraThread:
    """A running camera.

    Attributes:
        camera: its settings.
        counters: counts of its frames; may be read at any time.
        stats: exits, MACs and ages of its answers.
        exits: numbers of the exits in the network, (E,).
        latest: the last answered frame, RGB (H, W, 3) uint8, and its answer; None before.
        outputs: its own outputs, once the source is known.
        written: files that they have finished.
        error: why it ended, if an error ended it.
    """

    def __init__(
        self,
        camera: Camera,
        classify: Callable[..., list[Prediction]],
        exits: Sequence[int],
        static_macs: int,
        stop: threading.Event,
        listeners: Listeners,
    ) -> None:
        """Start nothing yet.

        Args:
            camera: its settings.
            classify: an opened runtime.
            exits: numbers of the exits in the network, (E,).
            static_macs: cost of the static network, MACs.
            stop: ends the camera when it is set.
            listeners: called in this camera's thread.
        """
        self.camera, self.counters = camera, Counters()
        self.stats = RuntimeStats(len(exits), static_macs)
        self.latest: tuple[RGB, CameraPrediction] | None = None
        self.outputs: Sequence[Output] | None = None
        self.written: list[Path] = []
        self.error: BaseException | None = None
        self.exits = tuple(exits)
        self._classify, self._stop, self._listeners = classify, stop, listeners
        self._detector = EventDetector(camera.name, camera.unsure_s, live=camera.source.live)
        self._opening, self._failures = False, 0
        self._span_s: tuple[float, float] | None = None
        self._thread = threading.Thread(target=self._run, name=f"mexit-fleet {camera.name}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait until the thread has ended, for at most `timeout_s` seconds."""
        self._thread.join(timeout_s)

    @property
    def running(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def opening(self) -> bool:
        """Whether it asks a web server what its address gives, which takes up to the time-out of the network."""
        return self._opening

    @property
    def seconds(self) -> float:
        """From the arrival of the first answered frame to the last answer, seconds."""
        return 0.0 if self._span_s is None else self._span_s[1] - self._span_s[0]

    @property
    def state(self) -> str:
        """One of "starting", "live", "lost", "frozen" and "ended"."""
        if self._thread.ident is not None and not self._thread.is_alive():
            return ENDED
        link = self.counters.link
        return LIVE if link == STARTING and self.counters.answered else link

    def _run(self) -> None:
        try:
            while not self._stop.is_set() and self._read_source():
                pass
        except BaseException as error:  # the fleet raises it in the thread that waits
            self.error = error.error if isinstance(error, _OutputFailed) else error
        finally:
            self._close_outputs()
            if self.error is not None and self.camera.keep_trying:
                why = str(self.error) or type(self.error).__name__
                self._listeners.on_message(f"camera {self.camera.name} ends: {why}")

    def _read_source(self) -> bool:
        """Answer frames until the source ends or fails; return whether to open it again."""
        camera = self.camera
        try:
            source = self._identify()
            if self.outputs is None:  # the first time; a source may fail later
                self.outputs = camera.open_outputs(live=source.live)
                self._detector = EventDetector(camera.name, camera.unsure_s, live=source.live)
            answers = classify_frames(
                self._classify,
                source,
                live=self._live,
                on_event=self._listeners.on_message,
                stopped=self._stopped,
                counters=self.counters,
                steady=camera.steady,
                name=camera.name,
                frozen_s=camera.frozen_s,
                **camera.request,
            )
            with closing(answers):
                for frame, prediction in answers:
                    self._take(frame, prediction)
                    if self.counters.answered == camera.limit or self._stop.is_set():
                        break
            return False
        except MexitError as error:
            if not camera.keep_trying or camera.source.kind == "files" or isinstance(error, _FINAL):
                raise
            self._wait(error)
            return True

    @property
    def _live(self) -> LiveSettings:
        live = self.camera.live
        return replace(live, connect_attempts=None) if self.camera.keep_trying else live

    def _identify(self) -> Source:
        self._opening = True
        try:
            return identify_source(self.camera.source, self.camera.live)
        finally:
            self._opening = False

    def _take(self, frame: RGB, prediction: CameraPrediction) -> None:
        self.latest, self._failures = (frame, prediction), 0
        answered_s = prediction.captured_s + prediction.age_ms / 1e3
        self._span_s = (prediction.captured_s if self._span_s is None else self._span_s[0], answered_s)
        position = self.exits.index(prediction.exit) + 1
        self.stats.add(position, prediction.age_ms, prediction.macs, unsure=prediction.label is None)
        self._each_output(methodcaller("write", frame, prediction))
        self._send(self._detector.update(prediction))
        self._listeners.on_result(prediction)

    def _stopped(self) -> bool:
        """Called several times a second: report changes of the state, and return whether to end."""
        self._send(self._detector.update_state(self.state, time.monotonic()))
        return self._stop.is_set()

    def _send(self, events: Sequence[CameraEvent]) -> None:
        for event in events:
            self._each_output(methodcaller("event", event))
            self._listeners.on_event(event)

    def _each_output(self, call: Callable[[Output], Any]) -> None:
        try:
            for output in (*(self.outputs or ()), *self.camera.shared):
                call(output)
        except MexitError as error:
            raise _OutputFailed(error) from None

    def _wait(self, error: MexitError) -> None:
        """Report an error of the source, and wait before the next attempt; delays grow as in `LiveReader`."""
        live = self.camera.live
        delay_s = min(live.longest_delay_s, live.first_delay_s * 2 ** min(self._failures, 30)) * random.uniform(0.5, 1)
        self._failures += 1
        self.counters.link = LOST
        self._listeners.on_message(f"{error}; trying again in {delay_s:.1f} s")
        self._send(self._detector.update_state(LOST, time.monotonic()))
        self._stop.wait(delay_s)

    def _close_outputs(self) -> None:
        for output in self.outputs or ():
            try:
                written = output.close()
            except MexitError as error:
                self.error = self.error or error
            else:
                self.written += [written] if written is not None else []


class _OutputFailed(Exception):
    """An output cannot be written: the camera ends, because later lines would leave a gap."""

    def __init__(self, error: MexitError) -> None:
        super().__init__(str(error))
        self.error = error
