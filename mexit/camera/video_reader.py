"""Video through PyAV: open, decode, one `Frame` a frame, each with the time stamp that the video gives it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from mexit.camera.frame import RGB, Counters, Frame, Say, now
from mexit.errors import BadInput, Damaged, MexitError, NotFound, missing_extra


def load_av() -> Any:
    """Import PyAV, or say what to type."""
    try:
        import av
    except ImportError:
        raise missing_extra("av", "camera", "Reading or writing video") from None
    return av


def video_file(path: Path, counters: Counters, say: Say) -> Iterator[Frame]:
    """Every frame of a file, in order.

    Raises:
        NotFound: it is gone.
        Damaged: no video at all, or none that can be read.
        BadInput: it holds no video stream.
    """
    # An absolute path, so that a colon in a file name is not taken for a protocol.
    yield from _to_the_end(str(path.absolute()), str(path), None, counters, say)


def web_video(address: str, name: str, counters: Counters, say: Say, timeout_s: float) -> Iterator[Frame]:
    """Every frame of a file on the web, in order. `name` is the address without credentials."""
    yield from _to_the_end(address, name, timeout_s, counters, say)


def _to_the_end(address: str, name: str, timeout_s: float | None, counters: Counters, say: Say) -> Iterator[Frame]:
    av = load_av()
    before = counters.arrived
    try:
        container = av.open(address, timeout=timeout_s)
    except av.FFmpegError as error:
        raise _cannot_open(av, error, name) from None
    with closing(container):
        stream = video_stream(container, name)
        try:
            yield from decode(container, stream, name, counters)
        except av.FFmpegError as error:
            say(f"{name}: reading stopped after {counters.arrived - before} frames: {reason(error)}")
        else:
            _say_if_short(stream.frames, counters.arrived - before, name, say)


def video_stream(container: Any, name: str) -> Any:
    """The first video stream. Raises `BadInput` if there is none, or none that can be decoded."""
    if not container.streams.video:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise BadInput(f"{name} holds no video stream (it holds {kinds})")
    # Threads stay within a frame, PyAV's default: decoding frames side by side delays live pictures, and a
    # damaged frame then takes good ones with it.
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise BadInput(f"{name} is coded in a way that this build of FFmpeg cannot decode")
    return stream


def decode(container: Any, stream: Any, name: str, counters: Counters) -> Iterator[Frame]:
    """The frames of a stream; those that cannot be decoded are counted and passed over."""
    for packet in container.demux(stream):
        yield from decode_packet(packet, name, counters, now())


def decode_packet(packet: Any, name: str, counters: Counters, captured_s: float) -> Iterator[Frame]:
    """The frames that one packet completes: mostly one."""
    try:
        frames = packet.decode()
    except load_av().FFmpegError:
        counters.lose()
        return
    for frame in frames:
        if frame.is_corrupt:
            counters.lose()
        else:
            yield _shot(frame, name, counters, captured_s)


def to_rgb(frame: Any) -> RGB:
    """A decoded frame as RGB (H, W, 3) uint8, turned upright as its display matrix says."""
    try:
        array = frame.to_ndarray(format="rgb24")
    except (ValueError, load_av().FFmpegError) as error:
        raise BadInput(f"a frame in {frame.format.name} cannot be converted: {reason(error)}") from None
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(array, turns)) if turns else array


def reason(error: BaseException) -> str:
    """What FFmpeg says went wrong, without the address it adds to it."""
    return str(getattr(error, "strerror", None) or error.__class__.__name__)


def _shot(frame: Any, name: str, counters: Counters, captured_s: float) -> Frame:
    return Frame(
        counters.arrive(), name, frame.time, captured_s, counters.skipped, lambda: to_rgb(frame), _as_it_is
    )


def _as_it_is(image: Any) -> RGB:
    array: RGB = image
    return array


def _cannot_open(av: Any, error: Any, name: str) -> MexitError:
    if isinstance(error, av.FileNotFoundError | av.HTTPNotFoundError):
        return NotFound(f"{name} does not exist")
    if isinstance(error, av.InvalidDataError | av.EOFError):
        return Damaged(f"{name} is no video that can be read, or its index is missing ({reason(error)})")
    return MexitError(f"{name} cannot be opened: {reason(error)}")


def _say_if_short(expected: int, found: int, name: str, say: Say) -> None:
    if 0 < found < expected:
        say(f"{name}: ends after {found} of the {expected} frames that its index promises")
