"""The way up and the way down: a bound socket, connections that cannot linger, signals that drain.

SIGTERM or SIGINT   not ready at once; what is in flight finishes, new work gets 503; then the end
a second one        the end at once, by the signal's own default
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from mexit.errors import UsageError
from mexit.serving.service import Service

HEAD_S = 10.0  # for the head of a request to arrive, from the first byte or the opening of the connection
KEEP_ALIVE_S = 30
SEND_S = 60.0  # for the client to take a response; until then it is held in memory
CONNECTIONS = 512  # half of the usual limit of open files
_SENDING_S = 5  # for responses on their way when everything else has ended
_BACKLOG = 512
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_EVERYWHERE = "use --host 127.0.0.1, or protect the server with --token TOKEN (or the variable MEXIT_TOKEN)"


def bind(host: str, port: int, *, guarded: bool) -> socket.socket:
    """Bind, not yet listening, so that a client that is early is refused and not left waiting.

    Raises:
        UsageError: no such address, the port is taken, or others could connect and no token guards the server.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"port {port} does not exist: choose --port from 1 to 65535, or 0 for any free one")
    family, address = _resolve(host, port)
    if not guarded and not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
        raise UsageError(f"host {host} can be reached from other machines: {_EVERYWHERE}")
    # asyncio switches Nagle's algorithm off only for sockets that say they are TCP; with it, every response
    # waits 40 ms for a delayed acknowledgement.
    opened = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        opened.close()
        raise UsageError(_cannot_bind(host, port, error)) from None
    return opened


def address_of(opened: socket.socket) -> str:
    """Where to send requests."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def start_listening(opened: socket.socket) -> None:
    """Take connections. Raises `UsageError` if another process bound the port at the same time and was faster."""
    try:
        opened.listen(_BACKLOG)
    except OSError as error:
        host, port = opened.getsockname()[:2]
        raise UsageError(_cannot_bind(host, port, error)) from None


def run(app: ASGIApp, service: Service, opened: socket.socket, ready: Callable[[str], None] | None) -> None:
    """Serve until a signal, then drain. Calls `ready` with the address once connections are taken."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,  # whoever runs this decides what is logged where
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        backlog=_BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=_SENDING_S,
    )
    try:
        start_listening(opened)
        _Server(config, service, ready).run([opened])
    finally:
        service.close()
        opened.close()


class Connection(H11Protocol):
    """Ends connections that do not bring a whole request head, or do not take their response, in time."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._start_timer(SEND_S)

    def _watch(self) -> None:
        """Start the timer if no request is being answered, and leave it alone if it runs already."""
        if self._busy():  # a client that asks again has taken what it asked for before
            self._stop_timer()
        elif self._timer is None and not self.transport.is_closing():
            self._start_timer(HEAD_S)

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._expire)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        if not self._busy():
            self.transport.abort()  # closing would wait for the client to take what is left

    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete


class _Server(uvicorn.Server):
    """uvicorn, but told to stop it drains first, and its end is an ordinary return."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[str], None] | None) -> None:
        super().__init__(config)
        self._service = service
        self._ready = ready
        self._give_up_s = float("inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready is not None and sockets:
            self._ready(address_of(sockets[0]))

    async def on_tick(self, counter: int) -> bool:
        """Asked ten times a second whether it is time to close."""
        drained = self._service.stopping and not self._service.active
        return await super().on_tick(counter) or drained or time.monotonic() > self._give_up_s

    def handle_exit(self, sig: int, _frame: FrameType | None) -> None:
        if self._service.stopping:
            signal.signal(sig, signal.SIG_DFL)
            os.kill(os.getpid(), sig)
        self._service.stopping = True
        self._give_up_s = time.monotonic() + self._service.limits.drain_s

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, without raising the signal again in the end: draining was all it asked for."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in _STOP_SIGNALS}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    try:
        if not host:
            raise OSError
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise UsageError(f"host {host!r} is no address of this machine: try --host 127.0.0.1") from None
    # localhost is often both, and the IPv6 one is often switched off.
    family, *_, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, address


def _cannot_bind(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use: choose another with --port, or --port 0 for any free one"
    if error.errno == errno.EACCES:
        return f"port {port} is for the system only: choose one above 1023 with --port"
    return f"host {host} is no address of this machine ({error.strerror}): try --host 127.0.0.1"
