"""`mexit camera`: classify the frames of a source, write the results, and report the counts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from mexit.camera.events import EventDetector
from mexit.camera.frame import RGB, Counters, OnEvent
from mexit.camera.identify_source import identify_source
from mexit.camera.live_stream import LiveSettings
from mexit.camera.outputs.message_settings import MqttSettings, WebhookSettings
from mexit.camera.outputs.open_outputs import FileSettings, open_files, open_messages
from mexit.camera.outputs.output import Output
from mexit.camera.overlay import Overlay
from mexit.camera.parse_source import parse_source
from mexit.camera.pipeline import classify_frames
from mexit.camera.prediction import CameraPrediction
from mexit.camera.steady import SteadySettings
from mexit.core.budget import Macs
from mexit.core.progress import StopSignal
from mexit.errors import UsageError
from mexit.runtime import Runtime
from mexit.runtime.prediction import REUSED
from mexit.runtime.stats import RuntimeStats
from mexit.runtime.time_policies import note_timing


@dataclass(frozen=True)
class CameraReport:
    """Counts of one run.

    Attributes:
        source: name of the source, without credentials.
        frames: answered frames.
        reused: answered frames whose picture had not changed, with the answer before.
        dropped: frames dropped for a newer one, by the rate limiter or by the trigger.
        refused: frames dropped by the rate limiter.
        left_out: frames dropped by the trigger.
        undecodable: damaged frames.
        reconnects: successful reconnections of a live source.
        seconds: from the first frame to the last answer.
        fps: answers per second.
        age_ms: 50th and 95th percentile of the time from a frame's arrival to its answer, within 6 %.
        exits: frames that left at each exit, (E,).
        unsure: answered frames whose answer is unsure.
        mean_macs: mean cost of a frame, MACs.
        saved: share of the full network's cost that was saved.
        outputs: written files, folders and patterns of files.
        lost: pictures and messages that were not delivered, by the name of the output.
        signal: number of the signal that ended the run, or None.
    """

    source: str
    frames: int
    reused: int
    dropped: int
    refused: int
    left_out: int
    undecodable: int
    reconnects: int
    seconds: float
    fps: float
    age_ms: dict[str, float] | None
    exits: tuple[int, ...]
    unsure: int
    mean_macs: float
    saved: float
    outputs: tuple[Path, ...]
    lost: dict[str, int]
    signal: int | None


@dataclass(frozen=True)
class CameraOptions(FileSettings):
    """Options of one run; the files to write are those of `FileSettings`.

    Attributes:
        budget: budget of each frame.
        cost, profile, backend, threads, rate, burst: as in `Runtime.open`.
        deadline_ms: deadline of each frame, milliseconds.
        mqtt: broker to publish to.
        webhook: web server that gets events.
        limit: number of answers after which the run ends.
        insecure: accept any certificate of a server with TLS.
        steady: region of interest, trigger, reused answers and votes.
    """

    budget: str = "low"
    cost: str = "macs"
    profile: Path | None = None
    backend: str = "auto"
    threads: int | None = None
    deadline_ms: float | None = None
    rate: Macs | None = None
    burst: Macs | None = None
    mqtt: MqttSettings | None = None
    webhook: WebhookSettings | None = None
    limit: int | None = None
    insecure: bool = False
    steady: SteadySettings = field(default_factory=SteadySettings)


def run_camera(
    bundle: Path,
    source: str,
    options: CameraOptions,
    *,
    on_result: Callable[[CameraPrediction], None] | None = None,
    on_event: OnEvent | None = None,
) -> CameraReport:
    """Classify every frame of files, or the newest frame of a live source, until it ends or a signal comes.

    The first Ctrl-C or SIGTERM ends the run after the present frame; outputs are finished and the report is
    returned. A second signal has its default effect.

    Args:
        bundle: the bundle's directory.
        source: camera number, URL, file, folder or glob; see `camera.parse_source`.
        options: options of the run.
        on_result: called with each prediction after it was written.
        on_event: called with a message when a stream is lost or back, and when times were measured.

    Raises:
        UsageError: an invalid source, limit or output.
        MexitError: an error of `Runtime.open`, `camera.pipeline.classify_frames` or an output.
    """
    parsed = parse_source(source)
    options.check(parsed.files)
    if options.limit is not None and options.limit < 1:
        raise UsageError(f"limit must be at least 1, found {options.limit}")
    runtime = Runtime.open(
        bundle,
        options.budget,
        backend=options.backend,
        threads=options.threads,
        rate=options.rate,
        burst=options.burst,
        cost=options.cost,
        profile=options.profile,
    )
    note = on_event or (lambda _: None)
    note_timing(runtime.timing, runtime.why_not_time, note)
    live = LiveSettings(insecure=options.insecure)
    parsed = identify_source(parsed, live)
    manifest = runtime.bundle.manifest
    overlay = Overlay(manifest.numbers, manifest.cumulative_macs)
    outputs = open_files(options, parsed.name, overlay, live=parsed.live, on_event=note)
    outputs += open_messages(options.mqtt, options.webhook, [parsed.name], manifest.name, on_event=note)
    detector = EventDetector(parsed.name, live=parsed.live)
    counters = Counters()
    stats = RuntimeStats(len(manifest.exits), int(manifest.costs.static))  # the latencies in it are the ages of answers
    written: list[Path | None] = []
    start_s: float | None = None
    seconds, reused = 0.0, 0
    with StopSignal() as stop, ExitStack() as stack:
        for output in reversed(outputs):  # closed also after an error
            stack.callback(lambda output: written.append(output.close()), output)
        answers = classify_frames(
            runtime,
            parsed,
            live=live,
            stopped=lambda: stop.requested,
            deadline_ms=options.deadline_ms,
            on_event=on_event,
            counters=counters,
            steady=options.steady,
        )
        stack.enter_context(closing(answers))
        for count, (frame, result) in enumerate(answers, start=1):
            position = manifest.numbers.index(result.exit) + 1
            stats.add([position], [result.age_ms], result.macs, unsure=int(result.label is None))
            reused += result.reason == REUSED
            start_s = result.captured_s if start_s is None else start_s
            seconds = result.captured_s + result.age_ms / 1e3 - start_s
            _write(outputs, frame, result, detector)
            if on_result is not None:
                on_result(result)
            if count == options.limit or stop.requested:
                break
    lost = {output.name: output.lost for output in outputs if output.lost}
    return _report(parsed.name, stats, reused, counters, seconds, tuple(filter(None, written)), lost, stop.number)


def _write(outputs: list[Output], frame: RGB, result: CameraPrediction, detector: EventDetector) -> None:
    events = detector.update(result)
    for output in outputs:
        output.write(frame, result)
        for event in events:
            output.event(event)


def _report(
    source: str,
    stats: RuntimeStats,
    reused: int,
    counters: Counters,
    seconds: float,
    outputs: tuple[Path, ...],
    lost: dict[str, int],
    signal_number: int | None,
) -> CameraReport:
    snapshot = stats.snapshot()
    frames, ages = snapshot.predictions, snapshot.latency_ms
    return CameraReport(
        source=source,
        frames=frames,
        reused=reused,
        dropped=counters.dropped,
        refused=counters.refused,
        left_out=counters.left_out,
        undecodable=counters.undecodable,
        reconnects=counters.reconnects,
        seconds=round(seconds, 3),
        fps=round(frames / seconds, 2) if seconds else 0.0,
        age_ms={name: round(ages[name], 3) for name in ("p50", "p95")} if ages else None,
        exits=snapshot.exits,
        unsure=snapshot.unsure,
        mean_macs=snapshot.mean_macs,
        saved=snapshot.saved,
        outputs=outputs,
        lost=lost,
        signal=signal_number,
    )
