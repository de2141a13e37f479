"""Several cameras, one engine: each camera has a thread, and their frames share batches and one rate limit.

A camera has at most one frame in the engine. One that fails, stalls or is slow thus delays no other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from mexit.camera.camera_thread import Camera, CameraThread, Listeners
from mexit.camera.events import CameraEvent
from mexit.camera.frame import RGB, Counters
from mexit.camera.pipeline import client_of
from mexit.camera.prediction import CameraPrediction
from mexit.errors import MexitError, UsageError
from mexit.runtime.fair_buckets import FairBuckets
from mexit.runtime.rate_limiter import RateLimiter
from mexit.runtime.runtime import Runtime
from mexit.runtime.shared_runtime import SharedRuntime
from mexit.runtime.stats import StatsSnapshot
from mexit.runtime.token_buckets import RateLimit

PICTURE_SIZE = (1280, 320)  # rows and columns of the picture in a status, at most
_COUNTS = ("arrived", "answered", "reused", "dropped", "refused", "left_out", "undecodable", "reconnects")
_POLL_S = 0.1
_LOG = logging.getLogger("mexit.camera")


@dataclass(frozen=True)
class CameraStatus:
    """A camera at one moment.

    Attributes:
        name: its name.
        source: name of the source, without credentials.
        state: "starting", "live", "lost" (no frames arrive), "frozen" (the picture does not change) or "ended".
        prediction: the last answer; None before the first one.
        age_s: seconds since the arrival of the frame of that answer; None before.
        counters: counts of frames.
        stats: exits, MACs and ages of the answers.
        exits: numbers of the exits in the network, (E,).
        error: why it has ended; empty without an error.
        frame: the frame of the last answer, RGB (H, W, 3) uint8; None before.
    """

    name: str
    source: str
    state: str
    prediction: CameraPrediction | None
    age_s: float | None
    counters: Counters
    stats: StatsSnapshot
    exits: Sequence[int]
    error: str
    frame: RGB | None

    @property
    def picture(self) -> RGB | None:
        """The frame with at most `PICTURE_SIZE` rows and columns: every n-th of them."""
        if self.frame is None:
            return None
        step = max(-(-side // most) for side, most in zip(self.frame.shape, PICTURE_SIZE, strict=False))
        return self.frame[::step, ::step]

    @property
    def frame_index(self) -> int | None:
        """Index of the frame of the last answer; None before."""
        return None if self.prediction is None else self.prediction.frame_index

    def to_json(self) -> dict[str, Any]:
        """JSON values; counts of frames are in `counters`, of answers by exit in `exits`."""
        counters = self.counters
        return {
            "name": self.name,
            "source": self.source,
            "state": self.state,
            "error": self.error or None,
            "age_s": None if self.age_s is None else round(self.age_s, 3),
            "answer": None if self.prediction is None else self.prediction.to_json(),
            "counters": {name: getattr(counters, name) for name in _COUNTS},
            "exits": {str(number): count for number, count in zip(self.exits, self.stats.exits, strict=True)},
            "macs": self.stats.macs,
            "saved_macs": self.stats.saved_macs,
        }


class Fleet:
    """Runs cameras until they end or are stopped. Use it in a `with` block, which stops them at its end."""

    def __init__(
        self,
        runtime: Runtime,
        cameras: Sequence[Camera],
        *,
        on_result: Callable[[CameraPrediction], None] = lambda _: None,
        on_message: Callable[[str], None] = _LOG.warning,
        on_event: Callable[[CameraEvent], None] = lambda _: None,
    ) -> None:
        """Prepare the engine; no source is opened yet.

        Args:
            runtime: the opened bundle; its rate limiter bounds all cameras together.
            cameras: with distinct names.
            on_result: called with each answer, after it was written.
            on_message: called with a message about a source.
            on_event: called with each event, after it was written. One of the three is called at a time.

        Raises:
            UsageError: two cameras have the same name.
        """
        names = [camera.name for camera in cameras]
        if len(set(names)) < len(names):
            raise UsageError(f"cameras need distinct names, found {', '.join(names)}")
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._engine = SharedRuntime(runtime, len(cameras))
        listeners = Listeners(self._alone(on_result), self._alone(on_message), self._alone(on_event))
        manifest = runtime.bundle.manifest
        self._threads = [
            CameraThread(camera, self._engine, manifest.numbers, int(manifest.costs.static), self._stop, listeners)
            for camera in cameras
        ]

    def __enter__(self) -> Fleet:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        self.wait()

    @property
    def cameras(self) -> Sequence[CameraThread]:
        """The cameras, in their order."""
        return self._threads

    def stop(self) -> None:
        """Ask all cameras to end after their present frame."""
        self._stop.set()
        self._engine.close()

    def wait(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Wait until all cameras have ended.

        Args:
            stopped: called about ten times a second; True stops the cameras.

        Raises:
            Exception: an error of a camera that is no `MexitError`; the other cameras are stopped then.
        """
        while running := [thread for thread in self._threads if thread.running]:
            failed = any(thread.error is not None and not _is_expected(thread.error) for thread in self._threads)
            if not self._stop.is_set() and (stopped() or failed):
                self.stop()
            if self._stop.is_set() and all(thread.opening for thread in running):
                break  # they have no frame, and no output is open
            running[0].join(_POLL_S)
        for thread in self._threads:
            if thread.error is not None and not _is_expected(thread.error):
                raise thread.error

    def status(self) -> list[CameraStatus]:
        """All cameras at this moment, in their order."""
        return [_status(thread) for thread in self._threads]

    def _alone(self, call: Callable[..., None]) -> Callable[..., None]:
        def locked(argument: object) -> None:
            with self._lock:
                call(argument)

        return locked


def share_rate(runtime: Runtime, limit: RateLimit | None, names: Sequence[str]) -> None:
    """Bound the MACs of cameras together; what one does not use goes to the others.

    Args:
        runtime: its rate limiter is replaced.
        limit: of all cameras; None: no limit.
        names: of the cameras.
    """
    if limit is None:
        runtime.rate_limiter = None
        return
    costs = runtime.bundle.manifest.cumulative_macs
    buckets = FairBuckets(limit, [client_of(name) for name in names], costs[-1], time.monotonic_ns())
    runtime.rate_limiter = RateLimiter(costs, buckets.limits, shared=buckets)


def _is_expected(error: BaseException) -> bool:
    return isinstance(error, MexitError)


def _status(thread: CameraThread) -> CameraStatus:
    frame, prediction = thread.latest or (None, None)
    return CameraStatus(
        name=thread.camera.name,
        source=thread.camera.source.name,
        state=thread.state,
        prediction=prediction,
        age_s=None if prediction is None else time.monotonic() - prediction.captured_s,
        counters=thread.counters.copy(),
        stats=thread.stats.snapshot(),
        exits=thread.exits,
        error="" if thread.error is None else str(thread.error),
        frame=frame,
    )
