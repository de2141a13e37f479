"""The command `mexit camera`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mexit.commands import output
from mexit.commands.options import (
    Backend,
    BudgetOption,
    BundleArg,
    Burst,
    CostOption,
    Deadline,
    Json,
    ProfileOption,
    Rate,
    Threads,
    given_options,
)
from mexit.core.artifact_paths import BUNDLES, newest
from mexit.core.budget import format_macs
from mexit.errors import UsageError

if TYPE_CHECKING:
    from mexit.camera.cameras_file import CamerasFile
    from mexit.camera.prediction import CameraPrediction
    from mexit.flows.camera import CameraReport, FleetReport


_VARIABLE = "MEXIT_SOURCE"
_OF_ALL = ("budget", "cost", "profile", "backend", "threads", "rate", "burst")  # also keys at the top of the file
_WITH_FILE = ("context", "bundle", "config", "limit", "json", *_OF_ALL)


def camera(
    context: typer.Context,
    bundle: BundleArg = None,
    *,
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="0 (the first camera), rtsp://..., a video, an image, a folder or a glob; for several cameras several "
            "times. [dim]Default: the lines of the variable MEXIT_SOURCE.[/]",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            envvar="MEXIT_CONFIG",
            metavar="FILE",
            help="File of cameras, TOML (docs/camera.md), in place of --source.",
            show_default=False,
        ),
    ] = None,
    budget: BudgetOption = "low",
    cost: CostOption = "time",
    profile: ProfileOption = None,
    out: Annotated[Path | None, typer.Option(help="Write an annotated H.264 video.")] = None,
    segment: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Begin a new video after this time: NAME-TIME.mp4.", show_default=False),
    ] = None,
    out_mb: Annotated[
        float | None,
        typer.Option(metavar="MB", help="Remove the oldest segments above this size.", show_default=False),
    ] = None,
    jsonl: Annotated[Path | None, typer.Option(help="Write one JSON line per frame.")] = None,
    events: Annotated[Path | None, typer.Option(help="Write one JSON line per event, such as a changed label.")] = None,
    jsonl_mb: Annotated[
        float | None,
        typer.Option(metavar="MB", help="Rotate JSON lines at this size: NAME.1, NAME.2, ...", show_default=False),
    ] = None,
    jsonl_keep: Annotated[int, typer.Option(help="Number of rotated files that are kept.")] = 5,
    save_unsure: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Save the pictures of unsure answers, one per second at most."),
    ] = None,
    save_unsure_mb: Annotated[
        float, typer.Option(metavar="MB", help="Remove the oldest of these pictures above this size.")
    ] = 500.0,
    mqtt: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="MEXIT_MQTT",
            help="Publish answers and events to a broker (mqtt://user:password@host:1883), also for Home Assistant.",
            show_default=False,
        ),
    ] = None,
    mqtt_topic: Annotated[str, typer.Option(metavar="TOPIC", help="Beginning of the topics.")] = "mexit",
    webhook: Annotated[
        str | None,
        typer.Option(metavar="URL", envvar="MEXIT_WEBHOOK", help="Post each event as JSON.", show_default=False),
    ] = None,
    backend: Backend = "auto",
    threads: Threads = None,
    deadline: Deadline = None,
    rate: Rate = None,
    burst: Burst = None,
    limit: Annotated[int | None, typer.Option(help="Stop after this many answered frames.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Accept any certificate of a camera with https, rtsps or rtmps.")
    ] = False,
    region: Annotated[
        str | None,
        typer.Option(
            help="Part of the picture to classify: x,y,width,height in pixels, or as shares (0.25,0,0.5,1). "
            "[dim]Default: all of it.[/]",
            show_default=False,
        ),
    ] = None,
    run: Annotated[
        str, typer.Option(help="Which frames to classify: every-frame, those with motion, or one per interval.")
    ] = "every-frame",
    interval: Annotated[float, typer.Option(help="Seconds between the answers of --run interval.")] = 2.0,
    motion: Annotated[float, typer.Option(help="Share of the picture that has to change for --run motion.")] = 0.01,
    reuse: Annotated[
        bool | None,
        typer.Option(
            "--reuse/--no-reuse",
            help="Give an unchanged picture the answer before it. [dim]Default: on live sources.[/]",
            show_default=False,
        ),
    ] = None,
    votes: Annotated[int, typer.Option(help="Number of last answers that vote for the steady label.")] = 1,
    hold: Annotated[
        int, typer.Option(help="Answers after which another label that leads the votes becomes the steady one.")
    ] = 1,
    json: Json = False,
) -> None:
    """Classify every frame of a video or folder, or the newest frame of live cameras."""
    from mexit.camera.outputs.message_settings import MqttSettings, WebhookSettings
    from mexit.camera.region import Region
    from mexit.camera.steady import SteadySettings
    from mexit.camera.triggers import TriggerSettings
    from mexit.flows.camera import CameraOptions, file_of_options, run_camera, run_cameras

    progress = output.RichProgress()
    # Read here, because typer divides a variable at spaces, which paths and passwords may hold.
    sources = source or os.environ.get(_VARIABLE, "").splitlines()
    if not sources and config is None:
        raise UsageError("name a camera or file with --source, or a file of cameras with --config")
    given = given_options(context)
    file = None if config is None else _read_file(config, given, context.params)
    path = bundle or newest(BUNDLES, progress)
    options = CameraOptions(
        budget=budget,
        cost=cost,
        profile=profile,
        backend=backend,
        threads=threads,
        deadline_ms=deadline,
        rate=rate,
        burst=burst,
        out=out,
        segment_s=segment,
        out_mb=out_mb,
        jsonl=jsonl,
        events=events,
        jsonl_mb=jsonl_mb,
        jsonl_keep=jsonl_keep,
        save_unsure=save_unsure,
        save_unsure_mb=save_unsure_mb,
        mqtt=MqttSettings(mqtt, mqtt_topic) if mqtt else None,
        webhook=WebhookSettings(webhook) if webhook else None,
        limit=limit,
        insecure=insecure,
        steady=SteadySettings(
            region=None if region is None else Region.parse(region),
            trigger=TriggerSettings(run=run, interval_s=interval, motion=motion, reuse=reuse),
            votes=votes,
            hold=hold,
        ),
    )
    show_labels = not (json or out or jsonl)
    if len(sources) == 1 and file is None:
        on_result = LabelChanges() if show_labels else None
        report = run_camera(path, sources[0], options, on_result=on_result, on_event=progress.note)
        output.print_json(report_to_json(report)) if json else show_camera(report)
        _exit(report.signal)
        return
    file = file or file_of_options(sources, options)
    on_result = LabelChanges(with_camera=True) if show_labels else None
    reports = run_cameras(path, file, limit=limit, on_result=on_result, on_event=progress.note)
    output.print_json(reports_to_json(reports)) if json else show_cameras(reports)
    _exit(reports.signal, failed=any(report.error is not None for report in reports.cameras))


def _read_file(path: Path, given: Mapping[str, str], values: Mapping[str, Any]) -> CamerasFile:
    """The cameras of a file; an option that was typed replaces the value at the top of the file."""
    from mexit.camera.cameras_file import read_cameras_file

    if others := [flag for name, flag in given.items() if name not in _WITH_FILE]:
        raise UsageError(f"{others[0]} is a setting of one camera: write it into {path}, or leave out --config")
    file = read_cameras_file(path)
    unset = [name for name in _OF_ALL if name in given or getattr(file, name) is None]
    return replace(file, **{name: values[name] for name in unset})


def _exit(signal_number: int | None, *, failed: bool = False) -> None:
    if signal_number is not None or failed:
        raise typer.Exit(1 if signal_number is None else 128 + signal_number)


class LabelChanges:
    """Print an answer when its steady label differs from the steady label before; an unsure camera has none."""

    def __init__(self, *, with_camera: bool = False) -> None:
        """No answer yet; `with_camera`: lines begin with the name of the camera."""
        self._last: dict[str, str | None] = {}
        self._with_camera = with_camera

    def __call__(self, answer: CameraPrediction) -> None:
        """Take the answer of one frame."""
        last = self._last.get(answer.camera, "")
        if answer.steady == last or (answer.steady is None and answer.label is not None):  # votes still count
            return
        self._last[answer.camera] = answer.steady
        label = "unsure"  # neither a class nor the confidence in one
        if answer.steady is not None:
            label = f"{answer.steady}, {output.percent(answer.confidence)}"
        camera = f"{answer.camera}: " if self._with_camera else ""
        output.say(f"{camera}frame {answer.frame_index}: {label} at exit {answer.exit}")


def report_to_json(report: CameraReport) -> dict[str, Any]:
    """Return the object that `--json` prints."""
    return {**asdict(report), "outputs": [str(path) for path in report.outputs]}


def reports_to_json(reports: FleetReport) -> dict[str, Any]:
    """Return the object that `--json` prints for several cameras."""
    return {**asdict(reports), "cameras": [report_to_json(report) for report in reports.cameras]}


def show_camera(report: CameraReport) -> None:
    """Print frame counts, the age of answers and their cost."""
    age = "-" if report.age_ms is None else f"{report.age_ms['p50']:.1f} / {report.age_ms['p95']:.1f} ms"
    rows = [
        ["frames answered", f"{report.frames} ({report.fps:.1f} per second)"],
        *([["with the answer before", str(report.reused)]] if report.reused else []),
        ["dropped for newer ones", str(report.dropped - report.refused - report.left_out)],
        *([["left out by --run", str(report.left_out)]] if report.left_out else []),
        *([["dropped by the rate limiter", str(report.refused)]] if report.refused else []),
        ["damaged", str(report.undecodable)],
        ["reconnects", str(report.reconnects)],
        ["age of an answer, p50 / p95", age],
        ["exits taken", output.counts(report.exits)],
        *([["unsure", str(report.unsure)]] if report.unsure else []),
        *([f"lost by {name}", str(count)] for name, count in report.lost.items()),
        ["mean cost", f"{format_macs(report.mean_macs)}, {output.percent(report.saved)} saved"],
    ]
    output.table(report.source, ["", ""], rows)
    if report.outputs:
        output.say("wrote " + ", ".join(str(path) for path in report.outputs))


def show_cameras(reports: FleetReport) -> None:
    """Print one line for each camera; ages of answers are 95th percentiles."""
    columns = ("camera", "answers", "per s", "dropped", "damaged", "reconnects", "p95 ms", "saved")
    rows = []
    for report in reports.cameras:
        age = "-" if report.age_ms is None else f"{report.age_ms['p95']:.0f}"
        counts = map(str, (report.dropped, report.undecodable, report.reconnects))
        rows.append(
            [report.camera, str(report.frames), f"{report.fps:.1f}", *counts, age, output.percent(report.saved)]
        )
    output.table("", columns, rows)
    for name, count in reports.lost.items():
        output.say(f"lost by {name}: {count}")
    for report in reports.cameras:
        if report.outputs:
            output.say(f"{report.camera}: wrote " + ", ".join(str(path) for path in report.outputs))
        if report.error is not None:
            output.warning(f"{report.camera}: {report.error}")
