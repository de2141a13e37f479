"""Classify the frames of a source with a runtime.

Files are read frame by frame, in order. Of live sources the newest frame is read, so that answers stay recent
however slow the network is. Every answer carries the number of frames dropped so far.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mexit.camera.decode import import_av
from mexit.camera.frame import RGB, Counters, Frame, OnEvent, clock_s
from mexit.camera.frozen import FrozenPicture
from mexit.camera.identify_source import identify_source
from mexit.camera.latest_frame import read_in_thread
from mexit.camera.live_stream import LiveReader, LiveSettings
from mexit.camera.parse_source import Source, is_image, parse_source
from mexit.camera.prediction import CameraPrediction
from mexit.camera.readers import read_files
from mexit.camera.steady import SteadyAnswers, SteadySettings
from mexit.errors import BadInput, Damaged, DeadlineExceeded, Overloaded
from mexit.runtime.prediction import REUSED, Prediction
from mexit.runtime.request import RequestOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

IMAGE_DURATION_S = 0.5  # of an image in a folder played in real time, and in annotated video
_LOG = logging.getLogger("mexit.camera")


AnsweredFrame = tuple[RGB, CameraPrediction]


def classify_frames(
    runtime: Callable[..., list[Prediction]],
    source: str | Source,
    *,
    every_frame: bool | None = None,
    live: LiveSettings | None = None,
    on_event: OnEvent | None = None,
    stopped: Callable[[], bool] | None = None,
    counters: Counters | None = None,
    steady: SteadySettings | None = None,
    name: str | None = None,
    frozen_s: float = 0.0,
    **options: Unpack[RequestOptions],
) -> Generator[AnsweredFrame, None, None]:
    """Classify the frames of a source.

    Args:
        runtime: an opened `Runtime`.
        source: camera number, URL, file, folder or glob, see `camera.parse_source`; or one that was identified.
        every_frame: True answers all frames, however old they get, and frames wait for tokens of the rate limiter.
            False answers the newest frame (a file is then played in real time), and a frame without tokens is
            dropped. Default: True for files, False for live sources.
        live: time-outs and delays of live sources.
        on_event: called with a message when a stream is lost or back and when a file ends early; default the
            logger `mexit.camera`.
        stopped: called several times a second; True ends the iteration.
        counters: updated while frames are read; may be read at any time.
        steady: region of interest, trigger, reused answers and votes. Default: every frame is answered, without votes;
            a live source reuses the answer for an unchanged picture.
        name: name of the camera in answers; default the name of the source.
        frozen_s: time without a change after which the picture of a live source counts as frozen (`Counters.link`),
            seconds; 0: never.
        options: of each request: budget, deadline_ms, max_exit and receipts of `runtime.request.RequestOptions`.

    Yields:
        The frame, RGB (H, W, 3) uint8, and its prediction. Closing the generator closes the source.

    Raises:
        UsageError, NotFound: invalid or missing source; raised by the call itself, which asks a web server once.
        MissingExtra: PyAV is needed and not installed.
        BadInput, Damaged: no video stream, or not one decodable frame.
        MexitError: a live source that cannot be reached.
    """
    live = live or LiveSettings()
    parsed = source if isinstance(source, Source) else parse_source(source)
    if not (parsed.files and all(is_image(path) for path in parsed.files)):
        import_av()
    parsed = identify_source(parsed, live) if isinstance(source, str) else parsed
    every_frame = not parsed.live if every_frame is None else every_frame
    reader = _Reader(
        parsed,
        every_frame,
        live,
        on_event or _LOG.warning,
        stopped or (lambda: False),
        counters or Counters(),
    )
    wait_ms = None if every_frame else 0.0
    name = parsed.name if name is None else name
    classify = partial(runtime, **options, client=client_of(name), wait_ms=wait_ms)
    answers = SteadyAnswers(steady or SteadySettings(), live=parsed.live)
    frozen = FrozenPicture(frozen_s if parsed.live else 0.0)
    return _answer_frames(reader, name, answers, frozen, lambda image: classify(image)[0])


def client_of(name: str) -> str:
    """The client of the rate limiter that a camera is."""
    return f"camera {name}"


def _answer_frames(
    reader: _Reader,
    name: str,
    answers: SteadyAnswers,
    frozen: FrozenPicture,
    classify: Callable[[Any], Prediction],
) -> Generator[AnsweredFrame, None, None]:
    counters, usable, last_error, last_source = reader.counters, False, "", ""
    with closing(reader.frames()) as frames:
        for frame in frames:
            try:
                image = frame.load()
                rgb = frame.to_rgb(image)
                _note_frozen(counters, frozen.update(rgb, frame.captured_s))
                now_s = clock_s(frame.time_s, frame.captured_s, live=reader.source.live)
                answer = answers.answer(image, rgb, now_s, classify)
            except (Overloaded, DeadlineExceeded):
                counters.refused += 1
                usable = True
                continue
            except (BadInput, Damaged) as error:
                counters.count_undecodable(arrived=False)
                if (frame.source, str(error)) != (last_source, last_error):  # not the same for each frame of a video
                    reader.on_event(f"{frame.source}: frame {frame.index} is skipped: {error}")
                last_source, last_error = frame.source, str(error)
                continue
            except BaseException:
                counters.refused += 1
                raise
            usable = True
            if answer is None:
                counters.left_out += 1
                continue
            counters.answered += 1
            counters.reused += answer[0].reason == REUSED
            yield rgb, _camera_prediction(name, frame, *answer, counters.refused + counters.left_out)
    if not usable and not reader.stopped():
        why = f": {last_error}" if last_error else ""
        raise Damaged(f"{reader.source.name}: not one of {counters.arrived} frames can be decoded{why}")


def _note_frozen(counters: Counters, is_frozen: bool) -> None:
    if is_frozen:
        counters.link = "frozen"
    elif counters.link == "frozen":
        counters.link = "live"


def _camera_prediction(
    camera: str, frame: Frame, prediction: Prediction, steady: str | None, dropped_here: int
) -> CameraPrediction:
    return CameraPrediction(
        **{field.name: getattr(prediction, field.name) for field in fields(prediction)},
        camera=camera,
        source=frame.source,
        frame_index=frame.index,
        time_s=frame.time_s,
        captured_s=frame.captured_s,
        age_ms=(time.monotonic() - frame.captured_s) * 1e3,
        dropped=frame.dropped + dropped_here,
        steady=steady,
    )


@dataclass(frozen=True)
class _Reader:
    """The frames of a source, directly or through a reader thread."""

    source: Source
    every_frame: bool
    live: LiveSettings
    on_event: OnEvent
    stopped: Callable[[], bool]
    counters: Counters

    def frames(self) -> Generator[Frame, None, None]:
        # Reading a pipe may wait for its writer for ever, and a stop signal must not.
        has_end = self.source.kind == "files" and all(path.is_file() for path in self.source.files)
        if not has_end or not self.every_frame:
            yield from self._read_in_thread()
            return
        with closing(self._read(threading.Event(), self.on_event)) as frames:
            for frame in frames:
                yield frame
                if self.stopped():
                    return

    def _read_in_thread(self) -> Generator[Frame, None, None]:
        events: queue.SimpleQueue[str] = queue.SimpleQueue()
        stop = threading.Event()

        def report_events() -> None:
            while not events.empty():
                self.on_event(events.get())  # in the caller's thread, where printing is safe

        def should_stop() -> bool:
            report_events()
            return self.stopped()

        frames = self._read(stop, events.put)
        if not self.source.live and not self.every_frame:
            frames = _real_time(frames, stop)
        try:
            yield from read_in_thread(frames, stop, self.counters, should_stop, every_frame=self.every_frame)
        finally:
            report_events()

    def _read(self, stop: threading.Event, on_event: OnEvent) -> Generator[Frame, None, None]:
        source, counters, live = self.source, self.counters, self.live
        if source.live:
            yield from LiveReader(source, live, counters, stop, on_event, catch_up=not self.every_frame).frames()
        else:
            yield from read_files(source, counters, on_event, live.read_timeout_s, insecure=live.insecure)


def _real_time(frames: Generator[Frame, None, None], stop: threading.Event) -> Generator[Frame, None, None]:
    """Yield the frames of files at the pace of their timestamps, like a camera."""
    due_s, last_s = time.monotonic(), None
    for frame in frames:
        if frame.time_s is None:
            due_s += IMAGE_DURATION_S
        elif last_s is not None:
            due_s += max(0.0, frame.time_s - last_s)  # timestamps restart with each file of a glob
        last_s = frame.time_s
        stop.wait(max(0.0, due_s - time.monotonic()))
        yield replace(frame, captured_s=time.monotonic())
