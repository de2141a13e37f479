"""`watch`: the frames of a source, answered one by one.

Files are read frame by frame, in order; live sources by the newest frame, so that answers stay young however
slow the network is. What was passed over is counted in every answer.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Protocol
from urllib.parse import urlsplit

from mexit.camera.frame import RGB, Counters, Frame, Say, now
from mexit.camera.image_reader import image_file, web_image
from mexit.camera.latest_frame import threaded
from mexit.camera.live import LiveReader, LiveSettings
from mexit.camera.source import Source, is_image, parse_source
from mexit.camera.video_reader import load_av, video_file, web_video
from mexit.core.budget import Budget
from mexit.errors import BadInput, Damaged, Overloaded
from mexit.runtime.prediction import Prediction

STILL_S = 0.5  # how long an image lasts where time passes: in a paced folder, in an annotated video
_LOG = logging.getLogger("mexit.camera")


class Answerer(Protocol):
    """What `watch` needs of a runtime."""

    def __call__(
        self,
        images: Any,
        *,
        budget: str | Budget | None,
        deadline_ms: float | None,
        max_exit: int | None,
        receipts: bool,
        client: str,
        wait_ms: float | None,
    ) -> list[Prediction]:
        """One prediction an image. Raises `Overloaded` for images that may not wait any longer."""


@dataclass(frozen=True, kw_only=True)
class CameraPrediction(Prediction):
    """A prediction, and the frame it is about.

    Attributes:
        source: the file or address of the frame, without credentials.
        frame_index: its place among all frames that arrived, from 0.
        time_s: its time stamp in the video; None for images.
        captured_s: when it arrived, on the monotonic clock.
        age_ms: from then to the answer.
        dropped: frames before it, since the start, that were passed over for newer ones or by the rate limiter.
    """

    source: str
    frame_index: int
    time_s: float | None
    captured_s: float
    age_ms: float
    dropped: int

    def to_json(self) -> dict[str, Any]:
        """Plain values, times rounded to a microsecond."""
        value = super().to_json()
        value["time_s"] = None if self.time_s is None else round(self.time_s, 6)
        value["captured_s"] = round(self.captured_s, 6)
        value["age_ms"] = round(self.age_ms, 3)
        return value


Answered = tuple[RGB, CameraPrediction]


def watch(
    runtime: Answerer,
    source: str,
    *,
    budget: str | Budget | None = None,
    deadline_ms: float | None = None,
    max_exit: int | None = None,
    receipts: bool = False,
    every_frame: bool | None = None,
    live: LiveSettings | None = None,
    on_event: Say | None = None,
    stopped: Callable[[], bool] | None = None,
    counters: Counters | None = None,
) -> Generator[Answered, None, None]:
    """Answer the frames of a source.

    Args:
        runtime: an opened `Runtime`.
        source: a camera number, an address, a file, a folder or a glob; see `address`.
        budget, deadline_ms, max_exit, receipts: of each answer, as in a call of the runtime.
        every_frame: whether to answer all frames, however old they get, or the newest one (a file is then
            played at its own speed). Default: all of files, the newest of live sources. Where every frame counts,
            frames wait for the rate limiter's tokens; elsewhere one without tokens is dropped and counted.
        live: time-outs and waiting times of live sources.
        on_event: told in words when a stream is lost or back and when a file ends early; the default is the
            logger `mexit.camera`.
        stopped: asked several times a second; true ends the iteration.
        counters: filled with what was dropped, damaged and reconnected, for reading at any time.

    Yields:
        The frame, RGB (H, W, 3) uint8, and its prediction. Closing the iterator closes the source.

    Raises:
        UsageError, NotFound: at once, for a source that cannot be one.
        MissingExtra: PyAV is needed and not installed.
        BadInput, Damaged: no video in it, or not one frame that can be decoded.
        MexitError: a live source that cannot be reached.
    """
    parsed = parse_source(source)
    if not (parsed.files and all(is_image(path) for path in parsed.files)):
        load_av()
    every_frame = not parsed.live if every_frame is None else every_frame
    reader = _Reader(
        parsed,
        every_frame,
        live or LiveSettings(),
        on_event or _LOG.warning,
        stopped or _never,
        counters or Counters(),
    )
    answer = partial(
        runtime,
        budget=budget,
        deadline_ms=deadline_ms,
        max_exit=max_exit,
        receipts=receipts,
        client=f"camera {parsed.name}",
        wait_ms=None if every_frame else 0.0,
    )
    return _answers(reader, answer)


def _answers(reader: _Reader, answer: Callable[[Any], list[Prediction]]) -> Generator[Answered, None, None]:
    answered, problem = 0, ""
    with closing(reader.shots()) as shots:
        for shot in shots:
            try:
                image = shot.load()
                [prediction] = answer(image)
                frame = shot.show(image)
            except Overloaded:
                reader.counters.refused += 1
                continue
            except (BadInput, Damaged) as error:
                reader.counters.undecodable += 1
                problem = f": {error}"
                reader.say(f"{shot.source}: frame {shot.index} is skipped{problem}")
                continue
            answered += 1
            yield frame, _about(shot, prediction, reader.counters.refused)
    if not answered and not reader.counters.refused and not reader.stopped():
        raise Damaged(f"{reader.source.name}: not one of {reader.counters.arrived} frames can be decoded{problem}")


def _about(shot: Frame, prediction: Prediction, refused: int) -> CameraPrediction:
    return CameraPrediction(
        **{field.name: getattr(prediction, field.name) for field in fields(prediction)},
        source=shot.source,
        frame_index=shot.index,
        time_s=shot.time_s,
        captured_s=shot.captured_s,
        age_ms=(now() - shot.captured_s) * 1e3,
        dropped=shot.dropped + refused,
    )


@dataclass(frozen=True)
class _Reader:
    """Composes the readers as the source and the frame rule ask for."""

    source: Source
    every_frame: bool
    live: LiveSettings
    say: Say
    stopped: Callable[[], bool]
    counters: Counters

    def shots(self) -> Generator[Frame, None, None]:
        if self.source.live or not self.every_frame:
            yield from self._in_thread()
            return
        with closing(self._read(threading.Event(), self.say)) as shots:
            for shot in shots:
                yield shot
                if self.stopped():
                    return

    def _in_thread(self) -> Generator[Frame, None, None]:
        events: queue.SimpleQueue[str] = queue.SimpleQueue()
        stop = threading.Event()

        def say_events() -> None:
            while not events.empty():
                self.say(events.get())  # in the caller's thread, where printing is safe

        def tick() -> bool:
            say_events()
            return self.stopped()

        shots = self._read(stop, events.put)
        if not self.source.live:
            shots = _paced(shots, stop)
        try:
            yield from threaded(shots, stop, self.counters, tick, wait=self.every_frame)
        finally:
            say_events()

    def _read(self, stop: threading.Event, say: Say) -> Generator[Frame, None, None]:
        source, counters = self.source, self.counters
        if source.live:
            reader = LiveReader(source, self.live, counters, stop, say, catch_up=not self.every_frame)
            yield from reader.shots()
        elif source.kind == "download":
            yield from self._download(say)
        for path in source.files:
            if is_image(path):
                yield image_file(path, counters)
                continue
            try:
                yield from video_file(path, counters, say)
            except (BadInput, Damaged) as error:
                if len(source.files) == 1:
                    raise
                counters.lose()
                say(f"{error}; the file is skipped")

    def _download(self, say: Say) -> Iterator[Frame]:
        address, name, timeout_s = self.source.address, self.source.name, self.live.read_timeout_s
        if is_image(urlsplit(address).path):
            yield web_image(address, name, self.counters, timeout_s)
        else:
            yield from web_video(address, name, self.counters, say, timeout_s)


def _paced(shots: Generator[Frame, None, None], stop: threading.Event) -> Generator[Frame, None, None]:
    """A file at its own speed, as if it were a camera."""
    due_s, last_s = now(), None
    for shot in shots:
        if shot.time_s is None:
            due_s += STILL_S
        elif last_s is not None:
            due_s += max(0.0, shot.time_s - last_s)  # the next file of a glob starts again
        last_s = shot.time_s
        stop.wait(max(0.0, due_s - now()))
        yield replace(shot, captured_s=now())


def _never() -> bool:
    return False
