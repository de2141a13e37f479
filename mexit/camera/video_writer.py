"""Annotated H.264 video in an mp4 file that is the old one or a complete new one, never a torn one.

Frames keep the time stamps of their source, also irregular ones. While it grows the file has a hidden temporary
name and is written in fragments, so that even after `kill -9` what was recorded until then can be played.
"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from mexit.camera.frame import RGB
from mexit.camera.overlay import Overlay
from mexit.camera.pipeline import STILL_S, CameraPrediction
from mexit.camera.video_reader import load_av, reason
from mexit.errors import MexitError, MissingExtra, UsageError

ENCODERS = ("libx264", "libopenh264", "h264_videotoolbox")
TICKS = 90_000  # a second, as MPEG counts time
SMALLEST_SIDE, LARGEST_SIDE = 320, 4096
_GOP = 50  # frames between key frames: how finely a player can jump, and how much a crash may lose
_HYBRID_SINCE = (62, 0)  # libavformat that turns fragments into a plain mp4 when it closes, edit list and all
_LONGEST_LEAD_S = 10.0  # a stream that starts later is shifted, else players show black until then
_JUMP_S = 1.0
_BT709 = 1


class VideoWriter:
    """A sink that draws predictions into frames and encodes them.

    Args:
        path: ends in `.mp4`.
        overlay: draws.
        live: the source is live: its time stamps may start anywhere and start again.

    Raises:
        UsageError: another ending.
        MissingExtra: PyAV is not installed, or came without an H.264 encoder.
    """

    def __init__(self, path: Path, overlay: Overlay, *, live: bool) -> None:
        if path.suffix.lower() != ".mp4":
            raise UsageError(f"annotated video is written as mp4: '{path}' must end in .mp4")
        self._encoder = _encoder()
        self._path = path
        self._temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        self._overlay = overlay
        self._clock = Clock(live=live)
        self._container: Any = None
        self._stream: Any = None
        self._broken = False

    def write(self, frame: RGB, prediction: CameraPrediction) -> None:
        """See `sinks.Sink.write`."""
        av = load_av()
        try:
            picture = self._overlay.draw(self._fit(enlarged(frame)), prediction)
            video = av.VideoFrame.from_ndarray(even(picture), format="rgb24")
            video = video.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            if self._container is None:
                self._open(video.width, video.height)
            video.pts, video.time_base = self._clock.tick(prediction), Fraction(1, TICKS)
            self._container.mux(self._stream.encode(video))
        except (OSError, av.FFmpegError) as error:
            self._broken = True
            raise MexitError(f"could not write {self._path}: {reason(error)}") from None

    def close(self) -> Path | None:
        """Finish the file and put it in place. See `sinks.Sink.close`."""
        if self._container is None:
            return None
        try:
            if not self._broken:
                self._container.mux(self._stream.encode())
            self._container.close()
            return None if self._broken else self._put_in_place()
        except (OSError, load_av().FFmpegError) as error:
            if self._broken:  # the reason has been raised before
                return None
            raise MexitError(
                f"could not finish {self._path}: {reason(error)}; what was there before is untouched"
            ) from None
        finally:
            self._container = None
            self._temporary.unlink(missing_ok=True)

    def _put_in_place(self) -> Path:
        _sync(self._temporary)
        os.replace(self._temporary, self._path)
        _sync(self._path.parent)
        return self._path

    def _open(self, width: int, height: int) -> None:
        av = load_av()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._temporary), "w", format="mp4", options=_mux_options(av))
        stream = self._container.add_stream(self._encoder, rate=25, options=_encode_options(self._encoder))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = Fraction(1, TICKS)
        context.gop_size = _GOP
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = _BT709
        self._stream = stream

    def _fit(self, frame: RGB) -> RGB:
        """A frame of another size than the first, as large as fits into that, with black bars."""
        if self._stream is None or even(frame).shape[:2] == (self._stream.height, self._stream.width):
            return frame
        from PIL import Image, ImageOps

        size = (self._stream.width, self._stream.height)
        return np.asarray(ImageOps.pad(Image.fromarray(frame), size), np.uint8)


class Clock:
    """Time stamps for the file, in ticks that always rise, from those of the source.

    Time stamps of a file are kept. Where they start again (the next file of a glob) the new ones follow on. Those
    of a live stream are kept as long as they agree with the time of arrival: cameras that restart or invent
    time stamps are put right by it. Images last `STILL_S` each.
    """

    def __init__(self, *, live: bool) -> None:
        self._live = live
        self._shift_s: float | None = None
        self._first_s = 0.0
        self._last_s = 0.0
        self._step_s = STILL_S
        self._last_tick = -1

    def tick(self, prediction: CameraPrediction) -> int:
        """The time stamp of the next frame."""
        time_s = self._time(prediction)
        self._step_s = time_s - self._last_s if time_s > self._last_s else self._step_s
        self._last_s = time_s
        self._last_tick = max(round(time_s * TICKS), self._last_tick + 1)
        return self._last_tick

    def _time(self, prediction: CameraPrediction) -> float:
        stamp = prediction.time_s
        if self._shift_s is None:
            self._first_s = prediction.captured_s
            start_s = 0.0 if stamp is None or self._live or not 0 <= stamp <= _LONGEST_LEAD_S else stamp
            self._shift_s = start_s - (stamp or 0.0)
            return start_s
        arrived_s = prediction.captured_s - self._first_s
        if stamp is None:
            return arrived_s if self._live else self._last_s + STILL_S
        time_s = stamp + self._shift_s
        jumps = time_s <= self._last_s or (self._live and abs(time_s - arrived_s) > _JUMP_S)
        if jumps:
            time_s = max(arrived_s, self._last_s) if self._live else self._last_s + self._step_s
            self._shift_s = time_s - stamp
        return time_s


def enlarged(frame: RGB) -> RGB:
    """A small frame by a whole factor, so that text on it can be read: (H, W, 3) uint8."""
    height, width = frame.shape[:2]
    factor = max(1, min(-(-SMALLEST_SIDE // min(height, width)), LARGEST_SIDE // max(height, width)))
    return frame if factor == 1 else np.repeat(np.repeat(frame, factor, axis=0), factor, axis=1)


def even(frame: RGB) -> RGB:
    """Even sides, as 4:2:0 colour needs them: the last row or column twice where one is odd."""
    height, width = frame.shape[:2]
    if height % 2 == 0 and width % 2 == 0:
        return frame
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _encoder() -> str:
    av = load_av()
    for name in ENCODERS:
        try:
            av.codec.Codec(name, "w")
        except (ValueError, av.FFmpegError):
            continue
        return str(name)
    raise MissingExtra(
        f"this build of PyAV has no H.264 encoder (looked for {', '.join(ENCODERS)}); its wheel has one: "
        "pip install --force-reinstall --only-binary av 'mexit[camera]'"
    )


def _encode_options(encoder: str) -> dict[str, str]:
    # No B frames: they are reordered, and then a fragment cut short by a crash has holes.
    return {"preset": "veryfast", "crf": "23", "bf": "0"} if encoder == "libx264" else {}


def _mux_options(av: Any) -> dict[str, str]:
    if tuple(av.library_versions["libavformat"])[:2] < _HYBRID_SINCE:
        return {}
    # Without an edit list a video that starts at 0.2 s would be moved to 0.
    return {"movflags": "hybrid_fragmented", "use_editlist": "1", "flush_packets": "1"}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
