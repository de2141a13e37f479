"""`mexit camera`: answer the frames of a source, write them down, and say how it went."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mexit.camera.frame import Counters
from mexit.camera.overlay import Overlay
from mexit.camera.pipeline import CameraPrediction
from mexit.camera.sinks import JsonLines, Sink
from mexit.camera.source import Source, parse_source
from mexit.camera.video_writer import VideoWriter
from mexit.core.budget import Macs
from mexit.errors import UsageError
from mexit.runtime import Runtime
from mexit.runtime.stats import RuntimeStats


@dataclass(frozen=True)
class CameraReport:
    """How it went.

    Attributes:
        source: what was watched, without credentials.
        frames: answered.
        dropped: passed over, for a newer frame or by the rate limiter.
        refused: those passed over by the rate limiter.
        undecodable: damaged, and passed over.
        reconnects: how often a live source came back.
        seconds: from the first frame to the last answer.
        fps: answers a second.
        age_ms: from the arrival of a frame to its answer, 50th and 95th percentile within 6 %.
        exits: how many left at each exit, (E,).
        mean_macs: per frame.
        saved: share of the full cost that was not spent.
        outputs: files that were written.
        signal: the number of the signal that ended it early, or None.
    """

    source: str
    frames: int
    dropped: int
    refused: int
    undecodable: int
    reconnects: int
    seconds: float
    fps: float
    age_ms: dict[str, float] | None
    exits: tuple[int, ...]
    mean_macs: float
    saved: float
    outputs: tuple[Path, ...]
    signal: int | None


def camera(
    bundle: Path,
    *,
    source: str,
    budget: str,
    backend: str = "auto",
    threads: int | None = None,
    deadline_ms: float | None = None,
    rate: Macs | None = None,
    burst: Macs | None = None,
    out: Path | None = None,
    jsonl: Path | None = None,
    limit: int | None = None,
    on_result: Callable[[CameraPrediction], None] | None = None,
    on_event: Callable[[str], None] | None = None,
) -> CameraReport:
    """Answer every frame of files, or the newest frame of a live source, until it ends or a signal comes.

    Ctrl-C and SIGTERM end it after the frame at hand: outputs are finished and the report is given. The second
    one is no longer caught.

    Args:
        bundle: the directory.
        source: see `camera.source`.
        budget, backend, threads, deadline_ms, rate, burst: of the runtime.
        out: annotated video, `.mp4`.
        jsonl: one JSON line a frame.
        limit: end after so many answers.
        on_result: called with each answer, after it was written.
        on_event: told when a stream is lost or back.

    Raises:
        UsageError, NotFound, BadInput, Damaged, MissingExtra, MexitError: see `camera.pipeline.watch`.
    """
    parsed = parse_source(source)
    _check(parsed, out, jsonl, limit)
    runtime = Runtime.open(bundle, budget, backend=backend, threads=threads, rate=rate, burst=burst)
    costs = runtime.bundle.manifest.cumulative_macs
    sinks: list[Sink] = [JsonLines(jsonl)] if jsonl else []
    sinks += [VideoWriter(out, Overlay(costs), live=parsed.live)] if out else []
    counters, tally = Counters(), _Tally(costs)
    options = {"deadline_ms": deadline_ms, "on_event": on_event, "counters": counters}
    with (
        _stop_on_signal() as stop,
        _finished(sinks) as outputs,
        closing(runtime.camera(source, stopped=stop.asked, **options)) as answers,
    ):
        for frame, result in answers:
            tally.add(result)
            for sink in sinks:
                sink.write(frame, result)
            if on_result is not None:
                on_result(result)
            if tally.frames == limit or stop.asked():
                break
    return tally.report(parsed.name, counters, tuple(outputs), stop.signal)


def _check(source: Source, out: Path | None, jsonl: Path | None, limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, found {limit}")
    outputs = [path.resolve() for path in (out, jsonl) if path is not None]
    if len(set(outputs)) < len(outputs):
        raise UsageError(f"video and JSON lines cannot both be written to {out}")
    for path in outputs:
        if path in {file.resolve() for file in source.files}:
            raise UsageError(f"{path} is the source: it would be overwritten; write to another file")
        if path.is_dir():
            raise UsageError(f"{path} is a folder; name a file in it")


class _Tally:
    """Adds answers up, in constant memory."""

    def __init__(self, costs: Sequence[int]) -> None:
        self._ages = RuntimeStats(len(costs), costs[-1])  # a ledger whose latencies are ages
        self.frames = 0
        self._first_s = 0.0
        self._last_s = 0.0

    def add(self, result: CameraPrediction) -> None:
        answered_s = result.captured_s + result.age_ms / 1e3
        self._first_s = self._first_s if self.frames else result.captured_s
        self._last_s = answered_s
        self.frames += 1
        self._ages.add([result.exit], [result.age_ms], result.macs)

    def report(
        self, source: str, counters: Counters, outputs: tuple[Path, ...], signal_number: int | None
    ) -> CameraReport:
        snapshot = self._ages.snapshot()
        ages = snapshot.latency_ms
        seconds = self._last_s - self._first_s
        return CameraReport(
            source=source,
            frames=self.frames,
            dropped=counters.dropped,
            refused=counters.refused,
            undecodable=counters.undecodable,
            reconnects=counters.reconnects,
            seconds=round(seconds, 3),
            fps=round(self.frames / seconds, 2) if seconds else 0.0,
            age_ms={name: round(ages[name], 3) for name in ("p50", "p95")} if ages else None,
            exits=snapshot.exits,
            mean_macs=snapshot.mean_macs,
            saved=snapshot.saved,
            outputs=outputs,
            signal=signal_number,
        )


@contextmanager
def _finished(sinks: Sequence[Sink]) -> Iterator[list[Path]]:
    """Finish every sink whatever happens; gives the list that the written files are put into."""
    outputs: list[Path] = []
    with ExitStack() as stack:
        for sink in reversed(sinks):
            stack.callback(_finish, sink, outputs)
        yield outputs


def _finish(sink: Sink, outputs: list[Path]) -> None:
    path = sink.close()
    if path is not None:
        outputs.append(path)


class _Stop:
    """Which signal has asked for an end. A plain attribute: a handler must not wait for a lock."""

    signal: int | None = None

    def asked(self) -> bool:
        return self.signal is not None


@contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    """Take the first Ctrl-C or SIGTERM as a request; elsewhere than in the main thread, leave them alone."""
    stop = _Stop()
    before: dict[int, Any] = {}

    def note(number: int, _: object) -> None:
        stop.signal = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()
