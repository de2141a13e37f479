"""The command `mexit camera`."""

from __future__ import annotations

from dataclasses import asdict
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
)
from mexit.core.artifact_paths import BUNDLES, newest
from mexit.core.budget import format_macs

if TYPE_CHECKING:
    from mexit.camera.prediction import CameraPrediction
    from mexit.flows.camera import CameraReport


def camera(
    bundle: BundleArg = None,
    *,
    source: Annotated[
        str,
        typer.Option(
            envvar="MEXIT_SOURCE", help="0 (the first camera), rtsp://..., a video, an image, a folder or a glob."
        ),
    ],
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
    json: Json = False,
) -> None:
    """Classify every frame of a video or folder, or the newest frame of a live camera."""
    from mexit.camera.outputs.message_settings import MqttSettings, WebhookSettings
    from mexit.flows.camera import CameraOptions, run_camera

    progress = output.RichProgress()
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
    )
    show_labels = not (json or out or jsonl)
    report = run_camera(
        path, source, options, on_result=LabelChanges() if show_labels else None, on_event=progress.note
    )
    output.print_json(report_to_json(report)) if json else show_camera(report)
    if report.signal is not None:
        raise typer.Exit(128 + report.signal)


class LabelChanges:
    """Print an answer when its label differs from the label of the answer before; an unsure answer has none."""

    def __init__(self) -> None:
        self._last: str | None = ""

    def __call__(self, answer: CameraPrediction) -> None:
        """Take the answer of one frame."""
        if answer.label != self._last:
            self._last = answer.label
            confidence = output.percent(answer.confidence)
            label = answer.label or answer.reason
            output.say(f"frame {answer.frame_index}: {label}, {confidence} at exit {answer.exit}")


def report_to_json(report: CameraReport) -> dict[str, Any]:
    """Return the object that `--json` prints."""
    return {**asdict(report), "outputs": [str(path) for path in report.outputs]}


def show_camera(report: CameraReport) -> None:
    """Print frame counts, the age of answers and their cost."""
    age = "-" if report.age_ms is None else f"{report.age_ms['p50']:.1f} / {report.age_ms['p95']:.1f} ms"
    rows = [
        ["frames answered", f"{report.frames} ({report.fps:.1f} per second)"],
        ["dropped for newer ones", str(report.dropped - report.refused)],
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
