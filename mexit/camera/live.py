"""Live sources: connect, decode, connect again when the stream dies.

Waiting times between attempts double up to a bound and are jittered, so that a hundred boxes do not storm a
camera that comes back. A refused password ends it at once: cameras lock accounts that keep trying.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from mexit.camera.decoder_lag import DecoderLag
from mexit.camera.frame import Counters, Frame, Say, now
from mexit.camera.source import Source
from mexit.camera.video_reader import decode_packet, load_av, reason, video_stream
from mexit.errors import BadInput, MexitError

_DEVICE_FORMATS = {"linux": "v4l2", "darwin": "avfoundation"}
_MICROSECOND = 1e-6


@dataclass(frozen=True)
class LiveSettings:
    """How patient to be with a live source.

    Attributes:
        open_timeout_s: for one attempt to connect.
        read_timeout_s: without any data the stream counts as dead.
        picture_timeout_s: so it does if data comes, but no picture that can be decoded.
        connect_attempts: before the first connection is given up.
        first_delay_s, longest_delay_s: between attempts; doubles from one to the other, with jitter.
        healthy_s: a connection that lived so long starts again at the first delay.
        give_up_s: without a picture, the source is given up after so long; None tries for ever.
        behind_s: data that is always there already for so long means that decoding is too slow: frames are
            then skipped to catch up with the camera.
    """

    open_timeout_s: float = 10.0
    read_timeout_s: float = 10.0
    picture_timeout_s: float = 20.0
    connect_attempts: int = 5
    first_delay_s: float = 0.5
    longest_delay_s: float = 30.0
    healthy_s: float = 10.0
    give_up_s: float | None = None
    behind_s: float = 1.0


class _Dead(Exception):
    """The connection is there, but it is no use."""


class LiveReader:
    """The frames of one live source, across connections.

    Args:
        source: a camera or an address.
        settings: how patient to be.
        counters: of what was not answered.
        stop: ends the reader at the next frame, and any wait at once.
        say: told when the stream is lost and when it is back.
        catch_up: skip frames when decoding is slower than the camera.
    """

    def __init__(
        self,
        source: Source,
        settings: LiveSettings,
        counters: Counters,
        stop: threading.Event,
        say: Say,
        *,
        catch_up: bool,
    ) -> None:
        self._source = source
        self._settings = settings
        self._counters = counters
        self._stop = stop
        self._say = say
        self._catch_up = catch_up
        self._failures = 0
        self._connected = False  # ever
        self._last_picture_s = now()

    def shots(self) -> Generator[Frame, None, None]:
        """Frames until `stop`.

        Raises:
            MexitError: no first connection, a refused password, or no picture for `give_up_s`.
            BadInput: connected, but there is no video in it.
        """
        av = load_av()
        while not self._stop.is_set():
            try:
                yield from self._connection()
                why = "the stream ended"
            except _Dead as error:
                why = str(error)
            except BadInput as error:  # a camera that starts may have no picture yet
                if not self._connected:
                    raise
                why = str(error)
            except av.FFmpegError as error:
                why = _why(av, error)
                if isinstance(error, av.HTTPUnauthorizedError | av.HTTPForbiddenError):
                    raise MexitError(f"{self._source.name}: {why}: check the user and the password") from None
            if not self._stop.is_set():
                self._pause(why)

    def _connection(self) -> Iterator[Frame]:
        with closing(open_live(self._source, self._settings)) as container:
            stream = video_stream(container, self._source.name)
            backlog = DecoderLag(self._settings.behind_s) if self._catch_up else None
            first_s: float | None = None
            for shot in self._decode(container, stream, backlog):
                if first_s is None:
                    first_s = shot.captured_s
                    self._welcome()
                self._last_picture_s = shot.captured_s
                if shot.captured_s - first_s >= self._settings.healthy_s:
                    self._failures = 0
                yield shot

    def _decode(self, container: Any, stream: Any, backlog: DecoderLag | None) -> Iterator[Frame]:
        asked = picture = now()
        for packet in container.demux(stream):
            if self._stop.is_set():
                return
            arrived = now()
            if backlog is not None and packet.size and backlog.skips(asked, arrived, packet.is_keyframe):
                self._counters.skip()
            else:
                for shot in decode_packet(packet, self._source.name, self._counters, arrived):
                    picture = arrived
                    yield shot
            if arrived - picture > self._settings.picture_timeout_s:
                raise _Dead(f"no picture for {self._settings.picture_timeout_s:g} s")
            asked = now()

    def _welcome(self) -> None:
        if self._connected:
            self._counters.reconnects += 1
            self._say(f"{self._source.name}: back after {now() - self._last_picture_s:.1f} s")
        self._connected = True

    def _pause(self, why: str) -> None:
        """Wait before the next attempt, or raise if there shall be none."""
        settings, name = self._settings, self._source.name
        self._failures += 1
        if not self._connected and self._failures >= settings.connect_attempts:
            raise MexitError(
                f"{name}: no connection after {self._failures} attempts ({why}): "
                "check that the camera is on, its address, and that this machine reaches it"
            )
        silent_s = now() - self._last_picture_s
        if self._connected and settings.give_up_s is not None and silent_s >= settings.give_up_s:
            raise MexitError(f"{name}: no picture for {silent_s:.1f} s ({why}); given up")
        delay_s = min(settings.longest_delay_s, settings.first_delay_s * 2 ** min(self._failures - 1, 30))
        delay_s *= random.uniform(0.5, 1.0)
        what = "lost" if self._connected else f"no connection yet, attempt {self._failures}"
        self._say(f"{name}: {what} ({why}); trying again in {delay_s:.1f} s")
        self._stop.wait(delay_s)


def open_live(source: Source, settings: LiveSettings) -> Any:
    """Open a camera or an address; raises what PyAV raises."""
    av = load_av()
    timeouts = (settings.open_timeout_s, settings.read_timeout_s)
    if source.kind == "device":
        kind = _DEVICE_FORMATS.get(sys.platform)
        if kind is None:
            raise MexitError(f"cameras by number are read on Linux and macOS, not on {sys.platform}")
        return av.open(source.address, format=kind, timeout=timeouts)
    return av.open(source.address, options=stream_options(source.address, settings), timeout=timeouts)


def stream_options(address: str, settings: LiveSettings) -> dict[str, str]:
    """FFmpeg's options for an address: short analysis, RTSP over TCP, time-outs on the socket itself."""
    scheme = address.partition("://")[0].lower()
    options = {"analyzeduration": str(round(1.0 / _MICROSECOND))}
    if scheme in ("rtsp", "rtsps"):
        # UDP loses packets without a word, and a lost packet smears the picture until the next key frame.
        options |= {"rtsp_transport": "tcp", "timeout": str(round(settings.read_timeout_s / _MICROSECOND))}
    elif scheme == "udp":
        options |= {"overrun_nonfatal": "1"}
    return options


def _why(av: Any, error: Any) -> str:
    # PyAV ends a call that takes too long by interrupting FFmpeg, which then reports just that.
    return "timed out" if isinstance(error, av.ExitError) else reason(error)
