"""Cameras beside the server: their state as JSON, their pictures, and their metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from io import BytesIO
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mexit.errors import NotFound, Overloaded
from mexit.serving.request_body import short_repr

STATES = ("starting", "live", "lost", "frozen", "ended")
OUTCOMES = ("answered", "dropped", "undecodable")
JPEG = "image/jpeg"
MJPEG = "multipart/x-mixed-replace; boundary=frame"
HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
MAX_STREAMS = 32
_QUALITY = 80  # of JPEG, percent
_POLL_S = 0.1  # between two looks for a new picture of a stream


class CameraState(Protocol):
    """One camera at one moment; `mexit.camera.fleet.CameraStatus` describes the attributes."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def frame_index(self) -> int | None:
        """Index of the last answered frame; None before."""

    @property
    def picture(self) -> NDArray[np.uint8] | None:
        """The last answered frame, RGB (H, W, 3) uint8; None before."""

    def to_json(self) -> dict[str, Any]:
        """Its state as JSON values."""


class Cameras(Protocol):
    """The running cameras."""

    def status(self) -> Sequence[CameraState]:
        """All cameras at this moment."""


class CameraViews:
    """What the routes of cameras show. For the event loop's thread only."""

    def __init__(self, cameras: Cameras, stopping: Callable[[], bool]) -> None:
        """No stream is open.

        Args:
            cameras: the running cameras.
            stopping: whether the server is stopping, which ends streams.
        """
        self._cameras, self._stopping = cameras, stopping
        self._streams = 0

    def states(self) -> list[dict[str, Any]]:
        """The answer to `GET /v1/cameras`."""
        return [camera.to_json() for camera in self._cameras.status()]

    async def picture(self, name: str) -> bytes:
        """The last answered frame of a camera, JPEG. Raises `NotFound` without the camera, or before a frame."""
        picture = self._find(name).picture
        if picture is None:
            raise NotFound(f"camera {short_repr(name)} has no picture yet")
        return await asyncio.to_thread(encode_jpeg, picture)

    def stream(self, name: str) -> AsyncGenerator[bytes, None]:
        """The answered frames of a camera from now on, MJPEG. Raises `NotFound`, `Overloaded`."""
        self._find(name)
        if self._streams >= MAX_STREAMS:
            raise Overloaded(f"{self._streams} streams are open already")
        return self._parts(name)

    async def _parts(self, name: str) -> AsyncGenerator[bytes, None]:
        self._streams += 1
        try:
            shown: int | None = None
            while not self._stopping():
                camera = self._find(name)
                picture, index = camera.picture, camera.frame_index
                if picture is not None and index != shown:
                    shown, content = index, await asyncio.to_thread(encode_jpeg, picture)
                    yield b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(content)
                    yield content + b"\r\n"
                await asyncio.sleep(_POLL_S)
        finally:
            self._streams -= 1

    def _find(self, name: str) -> CameraState:
        cameras = self._cameras.status()
        for camera in cameras:
            if camera.name == name:
                return camera
        known = ", ".join(camera.name for camera in cameras)
        raise NotFound(f"unknown camera {short_repr(name)}: this server has {known}")


class CameraCollector(Collector):
    """Series of cameras, read at every scrape."""

    def __init__(self, cameras: Cameras) -> None:
        self._cameras = cameras

    def collect(self) -> Iterator[Metric]:
        prefix, by_camera = "mexit_camera_", ["camera"]
        frames = CounterMetricFamily(prefix + "frames", "Frames that arrived", labels=["camera", "outcome"])
        reused = CounterMetricFamily(
            prefix + "reused", "Unchanged frames with the answer before them", labels=by_camera
        )
        reconnects = CounterMetricFamily(prefix + "reconnects", "Reconnections", labels=by_camera)
        exits = CounterMetricFamily(prefix + "exits", "Answers at each exit", labels=["camera", "exit"])
        macs = CounterMetricFamily(prefix + "macs", "Multiply-adds spent", labels=by_camera)
        age = GaugeMetricFamily(
            prefix + "age_seconds", "Since the arrival of the last answered frame", labels=by_camera
        )
        state = GaugeMetricFamily(prefix + "state", "1 for the present state", labels=["camera", "state"])
        for camera in self._cameras.status():
            name, now = camera.name, camera.to_json()
            counters = now["counters"]
            for outcome in OUTCOMES:
                frames.add_metric([name, outcome], counters[outcome])
            reused.add_metric([name], counters["reused"])
            reconnects.add_metric([name], counters["reconnects"])
            for number, count in now["exits"].items():
                exits.add_metric([name, number], count)
            macs.add_metric([name], now["macs"])
            if now["age_s"] is not None:
                age.add_metric([name], now["age_s"])
            for known in STATES:
                state.add_metric([name, known], int(known == now["state"]))
        yield from (frames, reused, reconnects, exits, macs, age, state)


def encode_jpeg(picture: NDArray[np.uint8]) -> bytes:
    """A picture, RGB (H, W, 3) uint8, as JPEG."""
    from PIL import Image  # optional, and slow to load

    buffer = BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
