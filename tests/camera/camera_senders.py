"""Fake cameras on this machine: MPEG-TS over TCP and UDP, and RTSP, each at the pace of a camera."""

from __future__ import annotations

import base64
import io
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from fractions import Fraction
from hashlib import md5
from typing import TypeVar

import av
import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
LIVE = {"preset": "ultrafast", "tune": "zerolatency", "g": "10"}


def transport_stream(frames: Sequence[NDArray[np.uint8]], fps: int) -> list[bytes]:
    """MPEG-TS, one chunk of bytes per frame; the timestamp of frame i is i / fps."""
    buffer, chunks, done = io.BytesIO(), [], 0
    with av.open(buffer, "w", format="mpegts", options={"flush_packets": "1"}) as container:
        stream = _live_stream(container, frames[0], fps)
        for i, frame in enumerate(frames):
            container.mux(stream.encode(_picture(frame, i, fps)))
            chunks.append(buffer.getvalue()[done:])
            done = buffer.tell()
    return chunks


def nal_units(frames: Sequence[NDArray[np.uint8]], fps: int) -> list[list[bytes]]:
    """H.264 as RTP carries it: the NAL units of each frame, without start codes."""
    units = []
    with av.open(io.BytesIO(), "w", format="h264") as container:
        stream = _live_stream(container, frames[0], fps)
        for i, frame in enumerate(frames):
            content = b"".join(bytes(packet) for packet in stream.encode(_picture(frame, i, fps)))
            parts = content.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1")
            units.append([part for part in parts if part])
    return units


def _live_stream(container: av.container.OutputContainer, frame: NDArray[np.uint8], fps: int) -> av.VideoStream:
    stream = container.add_stream("libx264", rate=fps, options=LIVE)
    stream.height, stream.width = frame.shape[:2]
    return stream


def _picture(frame: NDArray[np.uint8], i: int, fps: int) -> av.VideoFrame:
    picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
    picture.pts, picture.time_base = i, Fraction(1, fps)
    return picture


class Sender:
    """Runs `run` in a thread until the block ends.

    Attributes:
        sent: `time.monotonic()` when frame i was sent, on the present connection.
        connections: number of connections so far.
        over: set when the block ends.
    """

    def __init__(self) -> None:
        self.sent: list[float] = []
        self.connections = 0
        self.over = threading.Event()
        self._thread = threading.Thread(target=self._run_until_closed, daemon=True)

    def __enter__(self) -> Sender:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.unblock()
        self._thread.join(5)

    def unblock(self) -> None:
        """Wake the thread from a blocking call."""

    def run(self) -> None:
        """The thread's function."""
        raise NotImplementedError

    def _run_until_closed(self) -> None:
        with suppress(OSError):
            self.run()

    def pace(self, chunks: Sequence[T], fps: float, send: Callable[[T], object]) -> None:
        """Send the chunks at `fps` chunks per second."""
        self.sent.clear()
        start = time.monotonic()
        for i, chunk in enumerate(chunks):
            if self.over.wait(max(0.0, start + i / fps - time.monotonic())):
                return
            self.sent.append(time.monotonic())
            send(chunk)


def close_server(server: socket.socket) -> None:
    """Close a server socket. A last client connects first, because closing does not wake a thread in `accept`."""
    with suppress(OSError), socket.create_connection(server.getsockname(), 0.2):
        pass
    server.close()


class TcpCamera(Sender):
    """Serves one client at a time.

    Args:
        chunks: chunks of `transport_stream`.
        fps: frames per second.
        lives: number of frames on each connection before it ends; the last number holds for all later ones.
        stall: keep the connection open and silent instead of ending it.
    """

    def __init__(self, chunks: Sequence[bytes], fps: float, lives: Sequence[int] = (), stall: bool = False) -> None:
        super().__init__()
        self._chunks, self._fps = chunks, fps
        self._lives, self._stall = lives or [len(chunks)], stall
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        self.closed_by_client = threading.Event()

    def unblock(self) -> None:
        close_server(self._server)

    def run(self) -> None:
        while not self.over.is_set():
            client, _ = self._server.accept()
            life = self._lives[min(self.connections, len(self._lives) - 1)]
            self.connections += 1
            with client:
                try:
                    self.pace(self._chunks[:life], self._fps, client.sendall)
                    if self._stall:
                        client.settimeout(5)
                        client.recv(1)
                except OSError:
                    self.closed_by_client.set()


class UdpCamera(Sender):
    """Sends to a port."""

    def __init__(self, chunks: Sequence[bytes], fps: float) -> None:
        super().__init__()
        self._chunks, self._fps = chunks, fps
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.address = f"udp://127.0.0.1:{self._port}"

    def run(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
            to = ("127.0.0.1", self._port)

            def send(chunk: bytes) -> None:
                for start in range(0, len(chunk), 7 * 188):
                    with suppress(ConnectionRefusedError):
                        out.sendto(chunk[start : start + 7 * 188], to)

            self.pace(self._chunks, self._fps, send)


class RtspCamera(Sender):
    """Minimal RTSP: Basic or Digest authentication, and H.264 in RTP, in the TCP connection or over UDP alone."""

    def __init__(
        self, units: Sequence[Sequence[bytes]], fps: int, user: str = "", *, udp: bool = False, digest: bool = False
    ) -> None:
        super().__init__()
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM) if udp else None
        self._units, self._fps = units, fps
        self._user, self._digest = user, digest
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.transports: list[str] = []
        self.refused = 0

    def unblock(self) -> None:
        close_server(self._server)
        if self._udp is not None:
            self._udp.close()

    def run(self) -> None:
        while not self.over.is_set():
            client, _ = self._server.accept()
            self.connections += 1
            with client, client.makefile("rb") as lines, suppress(OSError):
                while self._answer(client, lines):
                    pass

    def _answer(self, client: socket.socket, lines: io.BufferedReader) -> bool:
        request = lines.readline().decode()
        if not request.strip():
            return False
        headers = {}
        while line := lines.readline().decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        method, address = request.split()[:2]
        extra, body, status = "", "", "200 OK"
        if self._user and method != "OPTIONS" and not self._is_known(method, headers.get("authorization", "")):
            self.refused += 1
            challenge = 'Digest realm="camera", nonce="n1"' if self._digest else 'Basic realm="camera"'
            status, extra = "401 Unauthorized", f"WWW-Authenticate: {challenge}\r\n"
        elif method == "OPTIONS":
            extra = "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n"
        elif method == "DESCRIBE":
            body = self._description()
            extra = f"Content-Base: {address}/\r\nContent-Type: application/sdp\r\nContent-Length: {len(body)}\r\n"
        elif method == "SETUP":
            self.transports.append(headers["transport"])
            extra = "Session: 1\r\nTransport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n"
            if self._udp is not None:
                status, extra = self._set_up_udp(self._udp, headers["transport"])
        else:
            extra = "Session: 1\r\n"
        reply = f"RTSP/1.0 {status}\r\nCSeq: {headers['cseq']}\r\n{extra}\r\n{body}"
        client.sendall(reply.encode())
        if method == "PLAY" and status.startswith("200"):
            self._play(client)
            return False
        return method != "TEARDOWN"

    def _is_known(self, method: str, authorization: str) -> bool:
        if not self._digest:
            return authorization == "Basic " + base64.b64encode(self._user.encode()).decode()
        given = dict(re.findall(r'(\w+)="([^"]*)"', authorization))
        user, _, password = self._user.partition(":")
        secret, request = (
            md5(text.encode()).hexdigest() for text in (f"{user}:camera:{password}", f"{method}:{given.get('uri')}")
        )
        right = md5(f"{secret}:n1:{request}".encode()).hexdigest()
        return authorization.startswith("Digest") and given.get("response") == right

    def _set_up_udp(self, udp: socket.socket, transport: str) -> tuple[str, str]:
        ports = re.search(r"client_port=(\d+)-\d+", transport)
        if ports is None:
            return "461 Unsupported Transport", ""
        udp.bind(("127.0.0.1", 0))
        udp.connect(("127.0.0.1", int(ports[1])))
        own = udp.getsockname()[1]
        return "200 OK", f"Session: 1\r\nTransport: RTP/AVP;unicast;{ports[0]};server_port={own}-{own + 1}\r\n"

    def _description(self) -> str:
        parameters = ",".join(base64.b64encode(unit).decode() for unit in self._units[0] if unit[0] & 31 in (7, 8))
        return (
            "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\nm=video 0 RTP/AVP 96\r\n"
            "c=IN IP4 0.0.0.0\r\na=rtpmap:96 H264/90000\r\na=control:track1\r\n"
            f"a=fmtp:96 packetization-mode=1;sprop-parameter-sets={parameters}\r\n"
        )

    def _play(self, client: socket.socket) -> None:
        number = 0
        frames: list[list[bytes]] = []
        for i, units in enumerate(self._units):
            frames.append([])
            for position, unit in enumerate(units):
                last = 0x80 if position == len(units) - 1 else 0
                header = struct.pack(">BBHII", 0x80, 96 | last, number % 65536, i * 90_000 // self._fps, 7)
                frames[-1].append(header + unit)
                number += 1

        def send(packets: list[bytes]) -> None:
            for packet in packets:
                if self._udp is None:
                    client.sendall(struct.pack(">cBH", b"$", 0, len(packet)) + packet)
                else:
                    self._udp.send(packet)

        self.pace(frames, self._fps, send)
