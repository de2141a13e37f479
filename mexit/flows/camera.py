"""`mexit camera`: classify the frames of cameras, write the results, and report the counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from mexit.camera.camera_thread import CameraThread
from mexit.camera.cameras_file import CamerasFile, cameras_of_sources
from mexit.camera.frame import OnEvent
from mexit.camera.outputs.message_settings import MqttSettings, WebhookSettings
from mexit.camera.outputs.open_outputs import FileSettings
from mexit.camera.outputs.output import Output
from mexit.camera.parse_source import parse_source
from mexit.camera.prediction import CameraPrediction
from mexit.camera.steady import SteadySettings
from mexit.core.budget import Macs
from mexit.core.progress import StopSignal
from mexit.errors import UsageError
from mexit.flows.fleet import running_fleet
from mexit.runtime import Runtime
from mexit.runtime.time_policies import note_timing


@dataclass(frozen=True)
class CameraReport:
    """Counts of one camera.

    Attributes:
        camera: its name.
        source: name of the source, without credentials.
        frames: answered frames.
        reused: those of them that got the answer before them, because the picture was unchanged.
        dropped: frames dropped for a newer one, by the rate limiter or by the trigger.
        refused: frames dropped by the rate limiter or because of their deadline.
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
        error: why the camera ended before the end of its source; None without an error.
        signal: number of the signal that ended the run, or None.
    """

    camera: str
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
    error: str | None
    signal: int | None


@dataclass(frozen=True)
class FleetReport:
    """Counts of one run with several cameras.

    Attributes:
        cameras: those of each camera.
        lost: messages that were not delivered, by the name of the output that all cameras write to.
        signal: number of the signal that ended the run, or None.
    """

    cameras: tuple[CameraReport, ...]
    lost: dict[str, int]
    signal: int | None


@dataclass(frozen=True)
class CameraOptions(FileSettings):
    """Options of one run with one source; the files to write are those of `FileSettings`.

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
    report = run_cameras(
        bundle,
        file_of_options([source], options),
        limit=options.limit,
        keep_trying=False,
        on_result=on_result,
        on_event=on_event,
    )
    [one] = report.cameras
    return replace(one, lost={**one.lost, **report.lost})


def file_of_options(sources: Sequence[str], options: CameraOptions) -> CamerasFile:
    """The cameras of sources, each with the same options.

    Raises:
        UsageError: a source is not valid; or an output that cameras cannot share.
        NotFound: a source does not exist.
    """
    files = {field.name: getattr(options, field.name) for field in fields(FileSettings)}
    if len(sources) > 1:
        shared_files = [name for name in ("out", "jsonl", "events", "save_unsure") if files[name] is not None]
        if shared_files:
            flag = shared_files[0].replace("_", "-")
            raise UsageError(f"--{flag} is for one camera: give each its own in a file of cameras (--config FILE)")
    for source in sources:
        options.check(parse_source(source).files)
    own = {name: getattr(options, name) for name in ("deadline_ms", "insecure", "steady")}
    of_all = {field.name: getattr(options, field.name) for field in fields(CamerasFile) if field.name != "cameras"}
    return CamerasFile(cameras_of_sources(sources, **own, **files), **of_all)


def run_cameras(
    bundle: Path,
    file: CamerasFile,
    *,
    limit: int | None = None,
    keep_trying: bool = True,
    on_result: Callable[[CameraPrediction], None] | None = None,
    on_event: OnEvent | None = None,
) -> FleetReport:
    """Classify the frames of several cameras with one engine, until all have ended or a signal comes.

    The first Ctrl-C or SIGTERM ends the run after the present frames; outputs are finished and the report is returned.
    A second signal has its default effect.

    Args:
        bundle: the bundle's directory.
        file: the cameras and what they share.
        limit: number of answers after which a camera ends.
        keep_trying: whether a source that fails is opened again and again; its error is in the report. Without it, the
            error is raised.
        on_result: called with each prediction after it was written.
        on_event: called with a message when a stream is lost or back, and when times were measured.

    Raises:
        UsageError: an invalid limit, rate, budget or output.
        MexitError: an error of `Runtime.open`.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, found {limit}")
    note = on_event or (lambda _: None)
    runtime = Runtime.open(
        bundle,
        file.budget or "low",
        backend=file.backend or "auto",
        threads=file.threads,
        cost=file.cost or "macs",
        profile=file.profile,
    )
    note_timing(runtime.timing, runtime.why_not_time, note)
    with StopSignal() as stop:
        with running_fleet(
            runtime,
            file,
            keep_trying=keep_trying,
            limit=limit,
            on_result=on_result or (lambda _: None),
            on_message=note,
        ) as (fleet, shared):
            fleet.wait(lambda: stop.requested)
        errors = [camera.error for camera in fleet.cameras if camera.error is not None]
        if errors and not keep_trying:
            raise errors[0]
        reports = tuple(_report(camera, stop.number) for camera in fleet.cameras)
        return FleetReport(reports, _lost(shared), stop.number)


def _lost(outputs: Sequence[Output]) -> dict[str, int]:
    return {output.name: output.lost for output in outputs if output.lost}


def _report(camera: CameraThread, signal_number: int | None) -> CameraReport:
    snapshot, counters = camera.stats.snapshot(), camera.counters
    frames, ages, seconds = snapshot.predictions, snapshot.latency_ms, camera.seconds
    return CameraReport(
        camera=camera.camera.name,
        source=camera.camera.source.name,
        frames=frames,
        reused=counters.reused,
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
        outputs=tuple(camera.written),
        lost=_lost(camera.outputs or ()),
        error=None if camera.error is None else str(camera.error),
        signal=signal_number,
    )
