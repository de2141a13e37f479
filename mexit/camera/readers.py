"""Readers of images and video files, on disk or on the web: frame by frame, in order.

For an image the runtime gets the file's bytes, so that `data.preprocess` alone prepares the network's input. Video
is decoded by PyAV.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import URLError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from mexit.camera import animation
from mexit.camera.decode import decode_packet, ffmpeg_message, import_av, report_colours, video_stream
from mexit.camera.frame import Counters, Frame, OnEvent
from mexit.camera.parse_source import Source, is_image
from mexit.data.preprocess import MAX_ENCODED_BYTES, decode_rgb, read_image
from mexit.errors import BadInput, Damaged, MexitError, NotFound, TooLarge

_USUAL_RATE = 25  # frames per second of a raw video without a rate, as in FFmpeg


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
            yield from _read_picture(str(path), partial(_read_image, path), counters, on_event)
            continue
        try:
            # An absolute path, because FFmpeg takes a relative name with a colon for a protocol.
            yield from _read_video(str(path.absolute()), str(path), None, counters, on_event)
        except MexitError as error:
            if len(source.files) == 1:
                raise
            counters.count_undecodable()
            on_event(f"{error}; the file is skipped")


def _read_picture(name: str, read: Callable[[], bytes], counters: Counters, on_event: OnEvent) -> Iterator[Frame]:
    """A picture as one frame, an animated one as its frames."""
    try:
        content = read()
    except (BadInput, Damaged) as error:
        yield _picture_frame(name, partial(_fail, error), None, counters)
        return
    picture = animation.open_picture(content)
    if picture is None or not animation.is_animated(picture):
        if picture is not None and (pages := animation.pages(picture)) > 1:
            on_event(f"{name} has {pages} pages; the first is read")
        yield _picture_frame(name, lambda: content, None, counters)
        return
    arrived_before = counters.arrived
    try:
        for time_s, image in animation.read_frames(picture):
            yield _picture_frame(name, partial(_same, image), time_s, counters)
    except Exception as error:  # Pillow's decoders raise many exceptions on damaged files
        counters.count_undecodable()
        on_event(f"{name}: reading stopped after {counters.arrived - arrived_before - 1} frames: {error}")


def _picture_frame(name: str, load: Callable[[], Any], time_s: float | None, counters: Counters) -> Frame:
    return Frame(counters.count_arrived(), name, time_s, time.monotonic(), counters.skipped, load, decode_rgb)


def _same(image: Any) -> Any:
    return image


def _fail(error: Exception) -> NoReturn:
    raise error


def _read_image(path: Path) -> bytes:
    try:
        return read_image(path)
    except NotFound as error:  # the file was removed after its folder was listed
        raise Damaged(str(error)) from None


def _read_download(source: Source, counters: Counters, on_event: OnEvent, timeout_s: float) -> Iterator[Frame]:
    url, name = source.address, source.name
    if is_image(urlsplit(url).path):
        yield from _read_picture(name, partial(_download, url, name, timeout_s), counters, on_event)
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
        report_colours(stream, name, on_event)

        def counted_s(frame: Frame) -> float:
            """The time of a frame without a timestamp (raw H.264, H.265), from its number and the rate."""
            return (frame.index - arrived_before) / float(stream.guessed_rate or _USUAL_RATE)

        try:
            for packet in container.demux(stream):
                for frame in decode_packet(packet, name, counters, time.monotonic()):
                    yield frame if frame.time_s is not None else replace(frame, time_s=counted_s(frame))
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
