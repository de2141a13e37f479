"""Decode packets of video with PyAV to upright RGB frames with square pixels and ordinary colours."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.camera import hdr
from mexit.camera.frame import RGB, Counters, Frame, OnEvent
from mexit.errors import BadInput, missing_extra

_MOST_STRETCHED = 8  # ratio of a pixel's sides beyond which it counts as a mistake in the file


def import_av() -> Any:
    """Import PyAV. Raises `MissingExtra`."""
    try:
        import av
    except ImportError:
        raise missing_extra("av", "camera", "Reading or writing video") from None
    return av


def ffmpeg_message(error: BaseException) -> str:
    """The message of an FFmpeg error, without the address that PyAV appends."""
    return str(getattr(error, "strerror", None) or error.__class__.__name__)


def video_stream(container: Any, name: str) -> Any:
    """The video stream of a container: no cover picture, and the default one where several are left.

    Raises:
        BadInput: there is none, or it cannot be decoded.
    """
    cover = import_av().stream.Disposition.attached_pic
    films = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not films:
        kinds = {stream.type for stream in container.streams if stream.type != "video"}
        kinds |= {"a cover picture"} if container.streams.video else set()
        raise BadInput(f"{name} holds no video stream (it holds {', '.join(sorted(kinds)) or 'nothing'})")
    best = container.streams.best("video")
    # The decoder keeps PyAV's default, slice threads: frame threads delay live frames, and a damaged frame then
    # damages others too.
    stream = best if best in films else films[0]
    if stream.codec_context is None:
        raise BadInput(f"{name} is coded in a way that this build of FFmpeg cannot decode")
    return stream


def report_colours(stream: Any, name: str, on_event: OnEvent) -> None:
    """Say once that the colours of a video are converted."""
    if colours := hdr.describe(stream.codec_context):
        on_event(f"{name} is {colours}: its colours are converted to those of ordinary (SDR, BT.709) pictures")


def decode_packet(packet: Any, name: str, counters: Counters, captured_s: float) -> Iterator[Frame]:
    """The frames that a packet completes, usually one. Damaged frames are counted and skipped."""
    try:
        frames = packet.decode()
    except import_av().FFmpegError:
        counters.count_undecodable()
        return
    for frame in frames:
        if frame.is_corrupt:
            counters.count_undecodable()
        else:
            load = partial(_to_rgb, frame, packet.stream.sample_aspect_ratio)
            yield Frame(counters.count_arrived(), name, frame.time, captured_s, counters.skipped, load, lambda rgb: rgb)


def _to_rgb(frame: Any, pixel_aspect: Fraction | None) -> RGB:
    """A decoded frame as RGB (H, W, 3) uint8: square pixels, ordinary colours, turned as its display matrix says."""
    width, height = _square_pixels(frame.width, frame.height, pixel_aspect)
    colours = hdr.describe(frame)
    try:
        array = frame.to_ndarray(width=width, height=height, format="rgb48le" if colours else "rgb24")
    except (ValueError, import_av().FFmpegError) as error:
        raise BadInput(f"a frame in {frame.format.name} cannot be converted: {ffmpeg_message(error)}") from None
    return turn(hdr.to_sdr(array, frame.color_trc) if colours else array, _display_matrix(frame))


def _square_pixels(width: int, height: int, pixel_aspect: Fraction | None) -> tuple[int, int]:
    """The size with square pixels: the side that is too short for the picture's shape grows."""
    ratio = pixel_aspect or Fraction(1)
    if not 1 < max(ratio, 1 / ratio) <= _MOST_STRETCHED:
        return width, height
    return (round(width * ratio), height) if ratio > 1 else (width, round(height / ratio))


def _display_matrix(frame: Any) -> NDArray[np.int32] | None:
    data = frame.side_data.get("DISPLAYMATRIX")
    return None if data is None else np.frombuffer(bytes(data), np.int32)[:9].reshape(3, 3)


def turn(rgb: RGB, matrix: NDArray[np.int32] | None) -> RGB:
    """Rotate by quarter turns and mirror a picture (H, W, 3) as a display matrix says.

    The pixel (x, y) is shown at (a x + c y, b x + d y), where the matrix is [[a, b, u], [c, d, v], [x0, y0, w]] (ISO
    14496-12, 8.5.2); other angles are rounded to quarter turns.
    """
    if matrix is None:
        return rgb
    (a, b), (c, d) = matrix[:2, :2].tolist()
    if abs(a) + abs(d) < abs(b) + abs(c):  # x and y change places
        rgb, a, d = rgb.swapaxes(0, 1), c, b
    return np.ascontiguousarray(rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
