"""uvicorn set-up: binding the sockets, connection time-outs, stop signals and graceful shutdown.

The first SIGTERM or SIGINT stops new work: ready is false, new requests get 503, requests in flight are answered.
A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mexit.core.progress import StopSignal, end_by_signal
from mexit.errors import UsageError
from mexit.serving.asgi import App
from mexit.serving.limits import Limits
from mexit.serving.server_state import ServerState
from mexit.serving.systemd_notify import SystemdNotify
from mexit.serving.unix_socket import PREFIX as UNIX
from mexit.serving.unix_socket import UnixSocket

_BACKLOG = 512
_PORT_ATTEMPTS = 8
_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # of IPv6 where the system has none
_UNIX_FAMILY = getattr(socket, "AF_UNIX", None)
_Address = tuple[socket.AddressFamily, Any]
_HOW_TO_PROTECT = "use --host 127.0.0.1, or protect the server with --token TOKEN (or the variable MEXIT_TOKEN)"


class Beside(Protocol):
    """A second server in the event loop of the HTTP server."""

    async def start(self) -> None:
        """Accept requests."""

    async def stop(self) -> None:
        """Accept no more, and return when the last answers are sent."""


def bind(
    host: str, port: int, *, has_token: bool, option: str = "--port", shared: bool = False
) -> tuple[socket.socket, ...]:
    """Bind a TCP socket to every address of a host, all with the same port, or bind a Unix socket.

    localhost often has an IPv4 and an IPv6 address, and clients differ in which one they try. The sockets do not
    listen yet, so early clients are refused instead of kept waiting.

    Args:
        host: address, host name or unix:PATH.
        port: from 1 to 65535, or 0 for any free one.
        has_token: whether requests need a token; required unless every address is loopback, or the socket a Unix one.
        option: the option of the port, for messages.
        shared: whether other processes of this user may bind the port too, where the system permits it.

    Returns:
        The sockets, those of IPv4 first. An IPv6 address is left out where the system has no IPv6.

    Raises:
        UsageError: unknown host, port in use, or a public host without a token.
    """
    if host.startswith(UNIX):
        return (UnixSocket(Path(host.removeprefix(UNIX))),)
    if not 0 <= port <= 65535:
        raise UsageError(f"port {port} does not exist: choose {option} from 1 to 65535, or 0 for any free one")
    addresses = _resolve(host, port)
    if not has_token and not all(ipaddress.ip_address(ip.partition("%")[0]).is_loopback for _, (ip, *_) in addresses):
        raise UsageError(f"host {host} can be reached from other machines: {_HOW_TO_PROTECT}")
    for _ in range(_PORT_ATTEMPTS):
        try:
            return _bind_all(addresses, shared)
        except OSError as error:
            failure = error
            if port or error.errno != errno.EADDRINUSE:  # else the free port of one address is in use at the next
                break
    raise UsageError(_bind_message(host, port, failure, option)) from None


def _bind_all(addresses: Sequence[_Address], shared: bool) -> tuple[socket.socket, ...]:
    bound: list[socket.socket] = []
    try:
        for family, (ip, port, *scope) in addresses:
            try:
                same_port = bound[0].getsockname()[1] if bound else port
                bound.append(_bind_one(family, (ip, same_port, *scope), shared))
            except OSError as error:
                if not bound or error.errno not in _NO_SUCH_ADDRESS:
                    raise
    except OSError:
        close_all(bound)
        raise
    return tuple(bound)


def _bind_one(family: socket.AddressFamily, address: Any, shared: bool) -> socket.socket:
    # asyncio disables Nagle's algorithm only on sockets created with IPPROTO_TCP. With Nagle's algorithm, every
    # response waits 40 ms for a delayed acknowledgement.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared and hasattr(socket, "SO_REUSEPORT"):
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def close_all(bound: Sequence[socket.socket]) -> None:
    """Close the sockets of `bind`."""
    for one in bound:
        one.close()


def url_of(bound: socket.socket, *, tls: bool = False) -> str:
    """The URL of a bound socket; unix:PATH of a Unix socket."""
    name = bound.getsockname()
    if isinstance(name, str):
        return UNIX + name
    host, port = name[:2]
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def start_listening(bound: Sequence[socket.socket]) -> None:
    """Accept connections. Raises `UsageError` if another process bound the same port and listens already."""
    for one in bound:
        try:
            one.listen(_BACKLOG)
        except OSError as error:
            host, port = one.getsockname()[:2]  # the name of a Unix socket is unique
            raise UsageError(_bind_message(host, port, error)) from None


def run(
    app: App,
    server: ServerState,
    bound: Sequence[socket.socket],
    ready: Callable[[str], None] | None,
    beside: Beside | None = None,
    tls: ssl.SSLContext | None = None,
    signals: StopSignal | None = None,
    systemd: SystemdNotify | None = None,
) -> None:
    """Serve until a stop signal, or until `server.stopping` is set, and all requests in flight are answered.

    Args:
        app: the application.
        server: what its models share.
        bound: the sockets of `bind`; they are closed at the end.
        ready: called with the URL once connections are accepted.
        beside: another server for the same models.
        tls: of all connections; None: without TLS.
        signals: the stop signals, which interrupt until here; None: signals keep their effects.
        systemd: hears when the server is ready, answers, or stops.
    """
    one = Server(uvicorn_config(app, server.limits), server, ready, beside, tls, systemd)
    try:
        if signals is not None:
            signals.defer(one.stop, end_by_signal)
        start_listening(bound)
        one.run(list(bound))
    finally:
        server.close()
        close_all(bound)


def uvicorn_config(app: App, limits: Limits) -> uvicorn.Config:
    """uvicorn's settings of a server with these limits."""
    return uvicorn.Config(
        app,
        http=partial(Connection, limits=limits),  # type: ignore[arg-type]
        ws="none",
        loop="auto",  # uvloop where it is installed
        lifespan="off",
        log_config=None,  # the program configures logging
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.connections,
        backlog=_BACKLOG,
        timeout_keep_alive=limits.keep_alive_s,
        timeout_graceful_shutdown=limits.close_s,
    )


class Connection(HttpToolsProtocol):
    """A connection that is closed if no whole request head arrives, or the response is not received, in time.

    The parser bounds neither the head of a request nor what stands between the chunks of a body. The connection is
    closed once `Limits.head_bytes` came without the end of a head or a byte of a body.
    """

    def __init__(self, *args: Any, limits: Limits, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._progress = False
        self._overhead_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._update_timer()

    def data_received(self, data: bytes) -> None:
        self._progress = False
        super().data_received(data)
        self._overhead_bytes = 0 if self._progress else self._overhead_bytes + len(data)
        if self._overhead_bytes > self._limits.head_bytes and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")
        self._update_timer()

    def on_headers_complete(self) -> None:
        self._progress = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._progress = True
        super().on_body(body)

    def _unsupported_upgrade_warning(self) -> None:
        """Go on with HTTP/1.1, as RFC 9110 allows; the parser has stopped."""
        self.parser = httptools.HttpRequestParser(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._start_timer(self._limits.send_s)

    def _update_timer(self) -> None:
        """Start the timer unless it runs; stop it while a request is answered.

        A client that sends its next request has received the response to the previous one.
        """
        if self._is_answering():
            self._stop_timer()
        elif self._timer is None and not self.transport.is_closing():
            self._start_timer(self._limits.head_s)

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._time_out)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._timer = None
        if not self._is_answering():
            self.transport.abort()  # `close` would wait for the client to receive the rest

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete


class Server(uvicorn.Server):
    """uvicorn's server, with a drain before the shutdown."""

    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        ready: Callable[[str], None] | None,
        beside: Beside | None = None,
        tls: ssl.SSLContext | None = None,
        systemd: SystemdNotify | None = None,
    ) -> None:
        super().__init__(config)
        self._systemd = systemd or SystemdNotify()
        self._beside = beside
        self._state, self._limits = state, state.limits
        self._ready = ready
        self._tls = tls
        self._drain_end_s = float("inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._beside is not None:
            await self._beside.start()
        await super().startup([])
        loop = asyncio.get_running_loop()
        for one in sockets or []:
            # uvicorn has neither a limit for the handshake of TLS nor Unix sockets that are bound already.
            create: Any = loop.create_server if one.family != _UNIX_FAMILY else loop.create_unix_server
            self.servers.append(await create(self._connection, sock=one, backlog=_BACKLOG, **self.tls_options))
        if sockets:
            url = url_of(sockets[0], tls=self._tls is not None)
            self._systemd.ready(url)
            if self._ready is not None:
                self._ready(url)

    @property
    def tls_options(self) -> dict[str, Any]:
        """Arguments of the event loop's functions that make connections."""
        return {} if self._tls is None else {"ssl": self._tls, "ssl_handshake_timeout": self._limits.head_s}

    def _connection(self) -> Connection:
        return Connection(config=self.config, server_state=self.server_state, app_state={}, limits=self._limits)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._beside is not None:
            await self._beside.stop()
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Return whether to shut down. uvicorn calls this ten times a second."""
        self._systemd.alive()
        drained = self._state.stopping and not self._state.active
        return await super().on_tick(counter) or drained or time.monotonic() > self._drain_end_s

    def stop(self) -> None:
        """Refuse new requests, and shut down once those in flight are answered."""
        self._state.stopping = True
        self._systemd.stopping()
        self._drain_end_s = time.monotonic() + self._limits.drain_s

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `StopSignal`, which handles them before the start and after the end too."""
        yield


def _resolve(host: str, port: int) -> list[_Address]:
    """The addresses of a host, those of IPv4 first."""
    try:
        if not host:
            raise OSError
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise UsageError(f"host {host!r} is no address of this machine: try --host 127.0.0.1") from None
    unique = dict.fromkeys((family, address) for family, *_, address in addresses)
    return sorted(unique, key=lambda entry: entry[0] != socket.AF_INET)


def _bind_message(host: str, port: int, error: OSError, option: str = "--port") -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use: choose another with {option}, or {option} 0 for any free one"
    if error.errno == errno.EACCES:
        return f"port {port} is for the system only: choose one above 1023 with {option}"
    return f"host {host} is no address of this machine ({error.strerror}): try --host 127.0.0.1"
