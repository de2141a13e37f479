"""Readers of images and video files, on disk or on the web: frame by frame, in order.

For an image the runtime gets the file's bytes, so that `data.preprocess` alone prepares the network's input. Video
is decoded by PyAV.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

import numpy as np

from mexit.camera.frame import RGB, Counters, Frame, OnEvent
from mexit.camera.parse_source import Source, is_image
from mexit.data.preprocess import MAX_ENCODED_BYTES, decode_rgb, read_image
from mexit.errors import BadInput, Damaged, MexitError, NotFound, TooLarge, missing_extra


def import_av() -> Any:
    """Import PyAV. Raises `MissingExtra`."""
    try:
        import av
    except ImportError:
        raise missing_extra("av", "camera", "Reading or writing video") from None
    return av


def read_files(source: Source, counters: Counters, on_event: OnEvent, timeout_s: float) -> Iterator[Frame]:
    """The frames of files, or of one file on the web, in order. Of several files, an unreadable one is skipped.

    Args:
        source: of the kind "files" or "download".
        counters: updated for every frame.
        on_event: called with a message when a video ends early and when a file is skipped.
        timeout_s: for answers of a web server, seconds.

    Raises:
        NotFound: the file does not exist.
        Damaged: the file is no readable video.
        BadInput: the file holds no video stream.
        MexitError: the file cannot be opened.
    """
    if source.kind == "download":
        yield from _read_download(source, counters, on_event, timeout_s)
    for path in source.files:
        if is_image(path):
            yield _image_frame(str(path), partial(_read_image, path), counters)
            continue
        try:
            # An absolute path, because FFmpeg takes a relative name with a colon for a protocol.
            yield from _read_video(str(path.absolute()), str(path), None, counters, on_event)
        except MexitError as error:
            if len(source.files) == 1:
                raise
            counters.count_undecodable()
            on_event(f"{error}; the file is skipped")


def video_stream(container: Any, name: str) -> Any:
    """The first video stream of a container. Raises `BadInput` if there is none or it cannot be decoded."""
    if not container.streams.video:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise BadInput(f"{name} holds no video stream (it holds {kinds})")
    # The decoder keeps PyAV's default, slice threads: frame threads delay live frames, and a damaged frame then
    # damages others too.
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise BadInput(f"{name} is coded in a way that this build of FFmpeg cannot decode")
    return stream


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
            yield _video_frame(frame, name, counters, captured_s)


def ffmpeg_message(error: BaseException) -> str:
    """The message of an FFmpeg error, without the address that PyAV appends."""
    return str(getattr(error, "strerror", None) or error.__class__.__name__)


def _image_frame(name: str, load: Callable[[], bytes], counters: Counters) -> Frame:
    return Frame(counters.count_arrived(), name, None, time.monotonic(), counters.skipped, load, decode_rgb)


def _read_image(path: Path) -> bytes:
    try:
        return read_image(path)
    except NotFound as error:  # the file was removed after its folder was listed
        raise Damaged(str(error)) from None


def _read_download(source: Source, counters: Counters, on_event: OnEvent, timeout_s: float) -> Iterator[Frame]:
    url, name = source.address, source.name
    if is_image(urlsplit(url).path):
        yield _image_frame(name, partial(_download, url, name, timeout_s), counters)
    else:
        yield from _read_video(url, name, timeout_s, counters, on_event)


def _download(url: str, name: str, timeout_s: float) -> bytes:
    parts = urlsplit(url)
    credentials, has_credentials, host = parts.netloc.rpartition("@")
    request = Request(urlunsplit(parts._replace(netloc=host)))
    if has_credentials:  # urllib does not accept them in the URL
        encoded = base64.b64encode(unquote(credentials).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    try:
        with urlopen(request, timeout=timeout_s) as response:
            content: bytes = response.read(MAX_ENCODED_BYTES + 1)
    except URLError as error:  # the error's text may hold the URL, so only its reason is shown
        reason = getattr(error.reason, "strerror", None) or error.reason
        if getattr(error, "code", None) == 404:
            raise NotFound(f"{name} does not exist (404)") from None
        raise MexitError(f"{name} cannot be fetched: {reason}") from None
    except (OSError, ValueError, HTTPException) as error:
        raise MexitError(f"{name} cannot be fetched: {type(error).__name__}") from None
    if len(content) > MAX_ENCODED_BYTES:
        raise TooLarge(f"{name} has more than {MAX_ENCODED_BYTES} bytes")
    return content


def _read_video(
    address: str, name: str, timeout_s: float | None, counters: Counters, on_event: OnEvent
) -> Iterator[Frame]:
    av = import_av()
    arrived_before = counters.arrived
    try:
        container = av.open(address, timeout=timeout_s)
    except av.FFmpegError as error:
        raise _open_error(av, error, name) from None
    with closing(container):
        stream = video_stream(container, name)
        try:
            for packet in container.demux(stream):
                yield from decode_packet(packet, name, counters, time.monotonic())
        except av.FFmpegError as error:
            frames = counters.arrived - arrived_before
            on_event(f"{name}: reading stopped after {frames} frames: {ffmpeg_message(error)}")
            return
        frames = counters.arrived - arrived_before
        if 0 < frames < stream.frames:
            on_event(f"{name}: ends after {frames} of the {stream.frames} frames that its index promises")


def _open_error(av: Any, error: Any, name: str) -> MexitError:
    if isinstance(error, av.FileNotFoundError | av.HTTPNotFoundError):
        return NotFound(f"{name} does not exist")
    if isinstance(error, av.InvalidDataError | av.EOFError):
        return Damaged(f"{name} is no video that can be read, or its index is missing ({ffmpeg_message(error)})")
    return MexitError(f"{name} cannot be opened: {ffmpeg_message(error)}")


def _video_frame(frame: Any, name: str, counters: Counters, captured_s: float) -> Frame:
    index = counters.count_arrived()
    return Frame(index, name, frame.time, captured_s, counters.skipped, lambda: _to_rgb(frame), lambda rgb: rgb)


def _to_rgb(frame: Any) -> RGB:
    """A decoded frame as RGB (H, W, 3) uint8, rotated as its display matrix says."""
    try:
        array: RGB = frame.to_ndarray(format="rgb24")
    except (ValueError, import_av().FFmpegError) as error:
        raise BadInput(f"a frame in {frame.format.name} cannot be converted: {ffmpeg_message(error)}") from None
    quarter_turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(array, quarter_turns)) if quarter_turns else array
