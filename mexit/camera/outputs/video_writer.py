"""Annotated H.264 video in an mp4 file, which is replaced only once the new video is complete.

Frames keep the timestamps of their source, including irregular ones. The file grows under a hidden temporary name
and in fragments, so that after `kill -9` the recorded part can be played, up to one of the last two key frames.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from mexit.camera.decode import ffmpeg_message, import_av
from mexit.camera.frame import RGB
from mexit.camera.outputs.output import FileOutput
from mexit.camera.overlay import Overlay
from mexit.camera.pipeline import IMAGE_DURATION_S
from mexit.camera.prediction import CameraPrediction
from mexit.core.atomic_io import sync_path
from mexit.errors import MexitError, MissingExtra, UsageError

ENCODERS = ("libx264", "libopenh264", "h264_videotoolbox")
TICKS_PER_S = 90_000  # MPEG's clock
_MIN_SIDE, _MAX_SIDE = 320, 4096  # pixels
_KEY_FRAME_INTERVAL = 50  # frames; bounds both the steps of seeking and the loss after a crash
_HYBRID_VERSION = (62, 0)  # first libavformat that turns fragments into a plain mp4 on close
_MAX_START_S = 10.0  # a later first timestamp is moved to 0, because players show black until then
_MAX_DRIFT_S = 1.0  # of a live stream's timestamps from the arrival times
_BT709 = 1


class VideoWriter(FileOutput):
    """Draws predictions into frames and encodes them."""

    name = "video"

    def __init__(self, path: Path, overlay: Overlay, *, live: bool, encoders: Sequence[str] = ENCODERS) -> None:
        """Open nothing yet.

        Args:
            path: the file; its name ends in `.mp4`.
            overlay: draws the predictions.
            live: whether the source is live; its timestamps may then start anywhere and restart.
            encoders: FFmpeg's names of encoders; the first available one is used.

        Raises:
            UsageError: the name has another suffix.
            MissingExtra: PyAV is not installed or has none of the encoders.
        """
        if path.suffix.lower() != ".mp4":
            raise UsageError(f"annotated video is written as mp4: '{path}' must end in .mp4")
        self._encoder = _find_encoder(encoders)
        self._path = path
        self._temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        self._overlay = overlay
        self._timestamps = Timestamps(live=live)
        self._container: Any = None
        self._stream: Any = None
        self._failed = False

    @property
    def duration_s(self) -> float:
        """Time between the first and the last written frame, seconds."""
        return self._timestamps.duration_s

    def write(self, frame: RGB, prediction: CameraPrediction) -> None:
        """Encode a frame, RGB (H, W, 3) uint8, with its prediction. Raises `MexitError` if writing fails."""
        av = import_av()
        try:
            picture = self._overlay.draw(self._fit(enlarge(self._overlay.outline(frame))), prediction)
            video_frame = av.VideoFrame.from_ndarray(pad_to_even(picture), format="rgb24")
            video_frame = video_frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            if self._container is None:
                self._open(video_frame.width, video_frame.height)
            video_frame.pts, video_frame.time_base = self._timestamps.next(prediction), Fraction(1, TICKS_PER_S)
            self._container.mux(self._stream.encode(video_frame))
        except (OSError, av.FFmpegError) as error:
            self._failed = True
            raise MexitError(f"could not write {self._path}: {ffmpeg_message(error)}") from None

    def close(self) -> Path | None:
        """Finish the file and move it to its place.

        Returns:
            The path, or None if no frame came or writing failed before.

        Raises:
            MexitError: the file cannot be finished; an earlier file is unchanged.
        """
        if self._container is None:
            return None
        try:
            if not self._failed:
                self._container.mux(self._stream.encode())
            self._container.close()
            if self._failed:
                return None
            sync_path(self._temporary)
            os.replace(self._temporary, self._path)
            sync_path(self._path.parent)
            return self._path
        except (OSError, import_av().FFmpegError) as error:
            if self._failed:  # `write` has raised the cause
                return None
            raise MexitError(
                f"could not finish {self._path}: {ffmpeg_message(error)}; what was there before is untouched"
            ) from None
        finally:
            self._container = None
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)

    def _open(self, width: int, height: int) -> None:
        av = import_av()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._temporary), "w", format="mp4", options=_container_options(av))
        stream = self._container.add_stream(self._encoder, rate=25, options=_encoder_options(self._encoder))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = Fraction(1, TICKS_PER_S)
        context.gop_size = _KEY_FRAME_INTERVAL
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = _BT709
        self._stream = stream

    def _fit(self, frame: RGB) -> RGB:
        """Scale a frame into the size of the first one, with black bars."""
        if self._stream is None or pad_to_even(frame).shape[:2] == (self._stream.height, self._stream.width):
            return frame
        from PIL import Image, ImageOps

        size = (self._stream.width, self._stream.height)
        return np.asarray(ImageOps.pad(Image.fromarray(frame), size), np.uint8)


class Timestamps:
    """Strictly increasing timestamps of the written file, from those of the source.

    Timestamps of files are kept; where they restart (the next file of a glob), the new ones continue the old ones.
    Timestamps of a live stream are kept while they agree with the arrival times, because cameras may restart or
    invent them. Each image lasts `IMAGE_DURATION_S`.
    """

    def __init__(self, *, live: bool) -> None:
        self._live = live
        self._shift_s: float | None = None
        self._first_s = 0.0
        self._start_s = 0.0
        self._last_s = 0.0
        self._step_s = IMAGE_DURATION_S
        self._last_ticks = -1

    @property
    def duration_s(self) -> float:
        """Time between the first and the last timestamp, seconds."""
        return self._last_s - self._start_s

    def next(self, prediction: CameraPrediction) -> int:
        """The timestamp of the next frame, in units of 1 / `TICKS_PER_S` seconds."""
        time_s = self._time_s(prediction)
        self._step_s = time_s - self._last_s if time_s > self._last_s else self._step_s
        self._last_s = time_s
        self._last_ticks = max(round(time_s * TICKS_PER_S), self._last_ticks + 1)
        return self._last_ticks

    def _time_s(self, prediction: CameraPrediction) -> float:
        source_s = prediction.time_s
        if self._shift_s is None:
            self._first_s = prediction.captured_s
            keep = source_s is not None and not self._live and 0 <= source_s <= _MAX_START_S
            self._start_s = source_s if keep and source_s is not None else 0.0
            self._shift_s = self._start_s - (source_s or 0.0)
            return self._start_s
        arrived_s = prediction.captured_s - self._first_s
        if source_s is None:
            return arrived_s if self._live else self._last_s + IMAGE_DURATION_S
        time_s = source_s + self._shift_s
        if time_s <= self._last_s or (self._live and abs(time_s - arrived_s) > _MAX_DRIFT_S):
            time_s = max(arrived_s, self._last_s) if self._live else self._last_s + self._step_s
            self._shift_s = time_s - source_s
        return time_s


def enlarge(frame: RGB) -> RGB:
    """Enlarge a small frame (H, W, 3) uint8 by a whole factor, so that text on it can be read."""
    height, width = frame.shape[:2]
    factor = max(1, min(-(-_MIN_SIDE // min(height, width)), _MAX_SIDE // max(height, width)))
    return frame if factor == 1 else np.repeat(np.repeat(frame, factor, axis=0), factor, axis=1)


def pad_to_even(frame: RGB) -> RGB:
    """Repeat the last row or column where a side is odd; 4:2:0 colour needs even sides."""
    height, width = frame.shape[:2]
    if height % 2 == 0 and width % 2 == 0:
        return frame
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _find_encoder(names: Sequence[str]) -> str:
    av = import_av()
    for name in names:
        try:
            av.codec.Codec(name, "w")
        except (ValueError, av.FFmpegError):
            continue
        return name
    raise MissingExtra(
        f"this build of PyAV has no H.264 encoder (looked for {', '.join(names)}); its wheel has one: "
        "pip install --force-reinstall --only-binary av 'mexit[camera]'"
    )


def _encoder_options(encoder: str) -> dict[str, str]:
    # B-frames are stored out of order, so a fragment cut short by a crash would have gaps.
    return {"preset": "veryfast", "crf": "23", "bf": "0"} if encoder == "libx264" else {}


def _container_options(av: Any) -> dict[str, str]:
    if tuple(av.library_versions["libavformat"])[:2] < _HYBRID_VERSION:
        return {}
    # Without an edit list, a video that starts at 0.2 s would be moved to 0. Without `delay_moov` the list is written
    # before its length is known, and readers of a recording that was cut off skip the first fragment.
    return {"movflags": "hybrid_fragmented+delay_moov", "use_editlist": "1", "flush_packets": "1"}
