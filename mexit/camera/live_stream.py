"""Live sources: connect, decode, and reconnect when the stream ends or stalls.

Delays between attempts double up to a bound, with jitter, so that many clients do not reconnect to a restarted
camera at the same moment. A refused password is an error at once, because cameras lock accounts after repeated
attempts.
"""

from __future__ import annotations

import errno
import random
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from mexit.camera.decode import decode_packet, ffmpeg_message, import_av, report_colours, video_stream
from mexit.camera.frame import Counters, Frame, OnEvent
from mexit.camera.parse_source import Source
from mexit.camera.web import CHECK_PASSWORD, AccessRefused, tls_options
from mexit.errors import BadInput, MexitError

Decode = Callable[[Any, str, Counters, float], Iterator[Frame]]
_DEVICE_FORMATS = {"linux": "v4l2", "darwin": "avfoundation"}
_MICROSECONDS = 1_000_000  # in a second
_WAITED_S = 0.006  # a longer read waited for the camera, not only for Python's global lock
_IDLE_SHARE = 0.3  # a reader that spends more of its time in short waits keeps up


@dataclass(frozen=True)
class LiveSettings:
    """Time-outs and delays of live sources, seconds.

    Attributes:
        open_timeout_s: for one attempt to connect.
        read_timeout_s: without any data, until the stream counts as dead.
        picture_timeout_s: with data but without a decodable frame, until the stream counts as dead.
        connect_attempts: attempts before the first connection is given up; None tries for ever.
        first_delay_s: delay before the second attempt; doubles from attempt to attempt.
        longest_delay_s: longest delay between attempts.
        healthy_s: a connection that lasted this long resets the delay.
        give_up_s: without a frame, until the source is given up; None tries for ever.
        insecure: accept any certificate of a server with TLS.
        behind_s: reads that never wait for this long mean that decoding is too slow, and frames are skipped.
    """

    open_timeout_s: float = 10.0
    read_timeout_s: float = 10.0
    picture_timeout_s: float = 20.0
    connect_attempts: int | None = 5
    first_delay_s: float = 0.5
    longest_delay_s: float = 30.0
    healthy_s: float = 10.0
    give_up_s: float | None = None
    insecure: bool = False
    behind_s: float = 1.0


class DecoderLag:
    """Detects that decoding is slower than a camera, and tells which packets to skip.

    A reader that keeps up waits for most packets. If every packet is already there, packets accumulate in socket
    buffers. Timestamps do not show this, because those of many cameras are invented.

    After `behind_s` seconds without a wait, packets are skipped until one has to be waited for, for at most
    `behind_s` seconds (a file over HTTP never makes the reader wait); then up to the next key frame, where decoding
    can start again.
    """

    def __init__(self, behind_s: float) -> None:
        self._behind_s = behind_s
        self._state = "keeping up"  # or "skipping", or "awaiting a key frame"
        self._since_s: float | None = None
        self._idle_s = 0.0

    def skips(self, requested_s: float, arrived_s: float, is_key: bool) -> bool:
        """Whether to skip the packet that was requested and arrived at these times."""
        since_s = requested_s if self._since_s is None else self._since_s
        waited = arrived_s - requested_s > _WAITED_S
        self._idle_s += arrived_s - requested_s
        late = arrived_s - since_s >= self._behind_s
        busy = self._idle_s < _IDLE_SHARE * (arrived_s - since_s)
        if self._state == "keeping up" and (waited or late or self._since_s is None):
            self._enter("skipping" if late and busy and not waited else "keeping up", arrived_s)
        elif self._state == "skipping" and (waited or late):
            self._enter("awaiting a key frame", arrived_s)
        if self._state == "awaiting a key frame" and is_key:
            self._enter("keeping up", arrived_s)
        return self._state != "keeping up"

    def _enter(self, state: str, now_s: float) -> None:
        self._state, self._since_s, self._idle_s = state, now_s, 0.0


@dataclass
class LiveReader:
    """The frames of one live source, across connections.

    Attributes:
        source: camera or stream.
        settings: time-outs and delays.
        counters: updated for every frame.
        stop: ends the reader at the next frame, and any delay at once.
        on_event: called with a message when the stream is lost and when it is back.
        catch_up: skip frames when decoding is slower than the camera.
        decode: decodes a packet.
    """

    source: Source
    settings: LiveSettings
    counters: Counters
    stop: threading.Event
    on_event: OnEvent
    catch_up: bool
    decode: Decode = decode_packet
    _failures: int = field(default=0, init=False)
    _was_connected: bool = field(default=False, init=False)
    _last_frame_s: float = field(default_factory=time.monotonic, init=False)

    def frames(self) -> Generator[Frame, None, None]:
        """Yield frames until `stop` is set, or a stream of known length or duration has ended.

        Raises:
            AccessRefused: the password is refused.
            MexitError: no first connection, or no frame for `give_up_s`.
            BadInput: the source has no video stream.
        """
        av = import_av()
        while not self.stop.is_set():
            try:
                if (yield from self._read_connection()):
                    return
                cause = "the stream ended"
            except _StreamDead as error:
                cause = str(error)
            except BadInput as error:  # a restarting camera may have no video stream yet
                if not self._was_connected:
                    raise
                cause = str(error)
            except av.FFmpegError as error:
                # PyAV enforces time-outs by interrupting FFmpeg, which reports only the interruption.
                cause = "timed out" if isinstance(error, av.ExitError) else ffmpeg_message(error)
                if isinstance(error, av.HTTPUnauthorizedError | av.HTTPForbiddenError):
                    raise AccessRefused(f"{self.source.name}: {cause}: {CHECK_PASSWORD}") from None
                if hint := self._why_no_camera(error):
                    raise MexitError(f"{self.source.name}: {cause}: {hint}") from None
            if not self.stop.is_set():
                self._delay(cause)

    def _why_no_camera(self, error: Any) -> str:
        """What to do about an error of a device that no later attempt changes; empty for other errors."""
        if self.source.kind == "device" and not self._was_connected:
            if isinstance(error, import_av().PermissionError):
                return "add your user to the group that owns the device (usually video)"
            if error.errno == errno.ENOTTY:
                return "the device is no camera"
        return ""

    def _read_connection(self) -> Generator[Frame, None, bool]:
        """The frames of one connection; returns whether the stream has ended, as a file does."""
        with closing(open_source(self.source, self.settings)) as container:
            stream, first_s = video_stream(container, self.source.name), None
            if not self._was_connected:
                report_colours(stream, self.source.name, self.on_event)
            for frame in self._read_packets(container, stream):
                if first_s is None:
                    first_s = frame.captured_s
                    self._report_connection()
                self._last_frame_s = frame.captured_s
                if frame.captured_s - first_s >= self.settings.healthy_s:
                    self._failures = 0
                yield frame
            return self._is_finite(container)

    def _is_finite(self, container: Any) -> bool:
        is_web = self.source.address.lower().startswith("http")
        return self.source.kind == "stream" and (container.duration is not None or (is_web and container.size > 0))

    def _read_packets(self, container: Any, stream: Any) -> Iterator[Frame]:
        lag = DecoderLag(self.settings.behind_s) if self.catch_up else None
        requested_s = last_frame_s = time.monotonic()
        for packet in container.demux(stream):
            if self.stop.is_set():
                return
            arrived_s = time.monotonic()
            if lag is not None and packet.size and lag.skips(requested_s, arrived_s, packet.is_keyframe):
                self.counters.arrived += 1
                self.counters.skipped += 1
            else:
                for frame in self.decode(packet, self.source.name, self.counters, arrived_s):
                    last_frame_s = arrived_s
                    yield frame
            if arrived_s - last_frame_s > self.settings.picture_timeout_s:
                raise _StreamDead(f"no picture for {self.settings.picture_timeout_s:g} s")
            requested_s = time.monotonic()

    def _report_connection(self) -> None:
        if self._was_connected:
            self.counters.reconnects += 1
            self.on_event(f"{self.source.name}: back after {time.monotonic() - self._last_frame_s:.1f} s")
        self._was_connected = True
        self.counters.link = "live"

    def _delay(self, cause: str) -> None:
        """Wait before the next attempt. Raises `MexitError` if there is none."""
        settings, name = self.settings, self.source.name
        self._failures += 1
        attempts = settings.connect_attempts
        if not self._was_connected and attempts is not None and self._failures >= attempts:
            raise MexitError(
                f"{name}: no connection after {self._failures} attempts ({cause}): "
                "check that the camera is on, its address, and that this machine reaches it"
            )
        silent_s = time.monotonic() - self._last_frame_s
        if self._was_connected and settings.give_up_s is not None and silent_s >= settings.give_up_s:
            raise MexitError(f"{name}: no picture for {silent_s:.1f} s ({cause}); given up")
        delay_s = min(settings.longest_delay_s, settings.first_delay_s * 2 ** min(self._failures - 1, 30))
        delay_s *= random.uniform(0.5, 1.0)
        state = "lost" if self._was_connected else f"no connection yet, attempt {self._failures}"
        self.counters.link = "lost"
        self.on_event(f"{name}: {state} ({cause}); trying again in {delay_s:.1f} s")
        self.stop.wait(delay_s)


class _StreamDead(Exception):
    """The connection is open, but gives no frames."""


def stream_options(url: str, settings: LiveSettings) -> dict[str, str]:
    """FFmpeg's options for a URL: short analysis, transport of RTSP, time-outs of the socket, certificates."""
    scheme = url.partition("://")[0].lower()
    options = {"analyzeduration": str(_MICROSECONDS), **tls_options(scheme, insecure=settings.insecure)}
    if scheme in ("rtsp", "rtsps"):
        # Over UDP, packets are lost silently, and each loss damages all frames up to the next key frame.
        options |= {"rtsp_transport": "tcp", "timeout": str(round(settings.read_timeout_s * _MICROSECONDS))}
        if scheme == "rtsp":  # UDP where the camera refuses TCP (status 461); it would not be encrypted
            options |= {"rtsp_transport": "tcp+udp", "rtsp_flags": "prefer_tcp"}
    elif scheme == "udp":
        options |= {"overrun_nonfatal": "1"}
    return options


def open_source(source: Source, settings: LiveSettings) -> Any:
    """Open a camera or a stream. Raises PyAV's errors."""
    av = import_av()
    timeouts = (settings.open_timeout_s, settings.read_timeout_s)
    if source.kind == "device":
        device_format = _DEVICE_FORMATS.get(sys.platform)
        if device_format is None:
            raise MexitError(f"cameras by number are read on Linux and macOS, not on {sys.platform}")
        return av.open(source.address, format=device_format, timeout=timeouts)
    return av.open(source.address, options=stream_options(source.address, settings), timeout=timeouts)
