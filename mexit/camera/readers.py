"""Readers of images and video files, on disk or on the web: frame by frame, in order.

For an image the runtime gets the file's bytes, so that `data.preprocess` alone prepares the network's input. Video
is decoded by PyAV.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from mexit.camera import animation
from mexit.camera.decode import decode_packet, ffmpeg_message, import_av, report_colours, video_stream
from mexit.camera.frame import Counters, Frame, OnEvent
from mexit.camera.parse_source import Source, is_image
from mexit.camera.web import download, tls_options
from mexit.data.preprocess import decode_rgb, read_image
from mexit.errors import BadInput, Damaged, MexitError, NotFound

_USUAL_RATE = 25  # frames per second of a raw video without a rate, as in FFmpeg


def read_files(
    source: Source, counters: Counters, on_event: OnEvent, timeout_s: float, *, insecure: bool = False
) -> Iterator[Frame]:
    """The frames of files, or of one file on the web, in order. Of several files, an unreadable one is skipped.

    Args:
        source: of the kind "files" or "download".
        counters: updated for every frame.
        on_event: called with a message when a video ends early and when a file is skipped.
        timeout_s: for answers of a web server, seconds.
        insecure: accept any certificate of a web server.

    Raises:
        NotFound: the file does not exist.
        Damaged: the file is no readable video.
        BadInput: the file holds no video stream.
        MexitError: the file cannot be opened.
    """
    if source.kind == "download":
        yield from _read_download(source, counters, on_event, timeout_s, insecure)
    for path in source.files:
        if is_image(path):
            yield from _read_picture(str(path), partial(_read_image, path), counters, on_event)
            continue
        try:
            # An absolute path, because FFmpeg takes a relative name with a colon for a protocol.
            yield from _read_video(str(path.absolute()), str(path), counters, on_event)
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


def _read_download(
    source: Source, counters: Counters, on_event: OnEvent, timeout_s: float, insecure: bool
) -> Iterator[Frame]:
    url, name = source.address, source.name
    if source.is_picture:
        fetch = partial(download, url, name, timeout_s, insecure=insecure)
        yield from _read_picture(name, fetch, counters, on_event)
    else:
        options = tls_options(url.partition(":")[0].lower(), insecure=insecure)
        yield from _read_video(url, name, counters, on_event, timeout=timeout_s, options=options)


def _read_video(address: str, name: str, counters: Counters, on_event: OnEvent, **how: Any) -> Iterator[Frame]:
    """The frames of a video; `how` are arguments of `av.open`."""
    av = import_av()
    arrived_before = counters.arrived
    try:
        container = av.open(address, **how)
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
            if frames == stream.frames > 0:  # a server that closes the connection without having announced a length
                return
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
