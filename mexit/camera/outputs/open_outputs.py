"""Opens the outputs that the settings of cameras ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mexit.camera.frame import OnEvent
from mexit.camera.outputs.json_lines import KEEP, EventLines, JsonLines
from mexit.camera.outputs.message_settings import MqttSettings, WebhookSettings
from mexit.camera.outputs.output import Output
from mexit.camera.outputs.save_unsure import QUOTA_MB, SaveUnsure
from mexit.camera.outputs.video_segments import VideoSegments
from mexit.camera.outputs.video_writer import VideoWriter
from mexit.camera.outputs.webhook import Webhook
from mexit.camera.overlay import Overlay
from mexit.camera.region import Region
from mexit.errors import UsageError


@dataclass(frozen=True)
class FileSettings:
    """Files of one camera.

    Attributes:
        out: annotated video, `.mp4`; with `segment_s` the beginning of the names of its segments.
        segment_s: duration of a segment, seconds; None = one file.
        out_mb: size of all segments, above which the oldest are removed, 10^6 bytes; None = no limit.
        jsonl: JSON lines of answered frames.
        events: JSON lines of events.
        jsonl_mb: size from which JSON lines are rotated, 10^6 bytes; None = no rotation.
        jsonl_keep: rotated files that are kept.
        save_unsure: folder of the pictures of unsure answers.
        save_unsure_mb: size of these pictures, above which the oldest are removed, 10^6 bytes.
    """

    out: Path | None = None
    segment_s: float | None = None
    out_mb: float | None = None
    jsonl: Path | None = None
    events: Path | None = None
    jsonl_mb: float | None = None
    jsonl_keep: int = KEEP
    save_unsure: Path | None = None
    save_unsure_mb: float = QUOTA_MB

    def check(self, sources: Sequence[Path] = ()) -> None:
        """Check the settings before anything is opened.

        Args:
            sources: files that are read.

        Raises:
            UsageError: two outputs or an output and a source are the same file, a file is a folder or the reverse, or a
                setting lacks the one that it belongs to.
        """
        named = {"--out": self.out, "--jsonl": self.jsonl, "--events": self.events}
        taken: dict[Path, str] = {}
        for flag, path in named.items():
            if path is None:
                continue
            try:
                place = path.resolve()
            except (OSError, RuntimeError) as error:  # links in a circle
                raise UsageError(f"{flag} {path} is no path that this system can use: {error}") from None
            if place in taken:
                raise UsageError(f"{taken[place]} and {flag} cannot both be written to {path}: name two files")
            if place in {source.resolve() for source in sources}:
                raise UsageError(f"{place} is the source: it would be overwritten; write to another file")
            if path.is_dir():
                raise UsageError(f"{place} is a folder; name a file in it")
            taken[place] = flag
        if self.save_unsure is not None and self.save_unsure.exists() and not self.save_unsure.is_dir():
            raise UsageError(f"{self.save_unsure} is a file: --save-unsure expects a folder")
        if self.segment_s is not None and self.out is None:
            raise UsageError("--segment divides the video of --out: add --out NAME.mp4")
        if self.out_mb is not None and self.segment_s is None:
            raise UsageError("--out-mb removes the oldest segments: add --segment SECONDS")
        if self.jsonl_mb is not None and self.jsonl is None and self.events is None:
            raise UsageError("--jsonl-mb rotates the files of --jsonl and --events: add one of them")


def open_files(
    settings: FileSettings,
    camera: str,
    overlay: Overlay,
    *,
    live: bool,
    region: Region | None = None,
    on_event: OnEvent,
) -> list[Output]:
    """Open the files of one camera; none is written before its first content comes.

    Args:
        settings: the files.
        camera: name of the camera.
        overlay: draws predictions into video.
        live: whether its source is live.
        region: the part of its picture that is classified; None: all of it.
        on_event: called with a message when a picture cannot be saved.

    Raises:
        UsageError: a setting is not valid.
        MissingExtra: video is to be written, and PyAV is not installed.
    """
    outputs: list[Output] = []
    if settings.jsonl is not None:
        outputs.append(JsonLines(settings.jsonl, max_mb=settings.jsonl_mb, keep=settings.jsonl_keep))
    if settings.events is not None:
        outputs.append(EventLines(settings.events, max_mb=settings.jsonl_mb, keep=settings.jsonl_keep))
    if settings.out is not None and settings.segment_s is not None:
        outputs.append(
            VideoSegments(settings.out, overlay, live=live, segment_s=settings.segment_s, max_mb=settings.out_mb)
        )
    elif settings.out is not None:
        outputs.append(VideoWriter(settings.out, overlay, live=live))
    if settings.save_unsure is not None:
        outputs.append(
            SaveUnsure(
                settings.save_unsure,
                camera,
                live=live,
                quota_mb=settings.save_unsure_mb,
                region=region,
                on_event=on_event,
            )
        )
    return outputs


def open_messages(
    mqtt: MqttSettings | None, webhook: WebhookSettings | None, cameras: Sequence[str], model: str, *, on_event: OnEvent
) -> list[Output]:
    """Open what sends messages; every camera writes to the same ones, and they are closed once, after all cameras.

    Args:
        mqtt: broker and topics, or None.
        webhook: address and events, or None.
        cameras: names of all cameras.
        model: name of the bundle.
        on_event: called in another thread with a message when a connection is made, refused or lost, or an event is.

    Raises:
        UsageError: an address or a topic is not valid.
        MissingExtra: paho-mqtt is not installed.
    """
    outputs: list[Output] = []
    if mqtt is not None:
        from mexit.camera.outputs.mqtt import Mqtt  # needs an optional package

        outputs.append(Mqtt(mqtt, cameras, model, on_event=on_event))
    if webhook is not None:
        outputs.append(Webhook(webhook, on_event=on_event))
    return outputs
