"""A small ASGI application: requests, responses and a table of routes.

A general framework spends 0.1 ms per request on routing, header objects and layers of middleware. That is more than
a small network takes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ClientDisconnected(Exception):
    """The client disconnected before its request was answered."""


class HTTPError(Exception):
    """A request that ends with a status of HTTP and a message, without a class of `mexit.errors`."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


class Request:
    """One HTTP request.

    Attributes:
        scope: the connection scope of ASGI.
        receive: returns the next part of the body, or that the client has disconnected.
        state: the object that the application was made with.
        path_params: the values of `{name}` parts of the route.
    """

    def __init__(self, scope: Scope, receive: Receive, state: object = None) -> None:
        self.scope, self.receive, self.state = scope, receive, state
        self.path_params: Mapping[str, str] = {}
        self._body_read = False

    @property
    def method(self) -> str:
        """GET, POST, ..."""
        return str(self.scope["method"])

    @property
    def path(self) -> str:
        """The decoded path, without the query."""
        return str(self.scope["path"])

    @property
    def host(self) -> str | None:
        """The network address of the client."""
        client = self.scope.get("client")
        return None if client is None else str(client[0])

    @property
    def awaits_continue(self) -> bool:
        """Whether the client holds back its body until the status 100, which the first chunk sends."""
        return not self._body_read and self.header("expect").lower() == "100-continue"

    @cached_property
    def query(self) -> dict[str, str]:
        """The values of the query; of a repeated name the last one."""
        return dict(parse_qsl(self.scope["query_string"].decode("latin-1"), keep_blank_values=True))

    def header(self, name: str) -> str:
        """The first value of a header, empty without one; `name` in any case."""
        values = self.header_values(name)
        return values[0] if values else ""

    def header_values(self, name: str) -> list[str]:
        """All values of a header."""
        key = name.lower().encode("latin-1")
        return [value.decode("latin-1") for header, value in self.scope["headers"] if header == key]

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body in parts. Raises `ClientDisconnected`."""
        self._body_read = more = True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            more = message.get("more_body", False)
            yield message.get("body", b"")


@dataclass(frozen=True)
class Response:
    """One HTTP response.

    Attributes:
        content: the body.
        status: the status of HTTP.
        headers: without Content-Length.
    """

    content: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    async def send(self, send: Send) -> None:
        """Send the response."""
        headers = [*encode_headers(self.headers), (b"content-length", b"%d" % len(self.content))]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.content})


@dataclass(frozen=True, kw_only=True)
class StreamResponse(Response):
    """A response whose body is sent in parts as they come, until they end or the client has disconnected.

    Attributes:
        parts: the body.
        receive: of the request.
    """

    parts: AsyncGenerator[bytes, None]
    receive: Receive

    async def send(self, send: Send) -> None:
        """Send the response."""
        disconnected = asyncio.ensure_future(self._disconnect())
        try:
            await send({"type": "http.response.start", "status": self.status, "headers": encode_headers(self.headers)})
            async for part in self.parts:
                if disconnected.done():
                    return
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            disconnected.cancel()
            await self.parts.aclose()

    async def _disconnect(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass


def encode_headers(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Headers as ASGI has them."""
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Route:
    """A path, in which `{name}` stands for one part, and its handler."""

    path: str
    handler: Handler
    method: str = "GET"

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the whole path."""
        return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(self.path)))

    @property
    def methods(self) -> tuple[str, ...]:
        """HEAD is answered wherever GET is."""
        return ("GET", "HEAD") if self.method == "GET" else (self.method,)


class Routes:
    """A table of routes; the first that matches counts."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._patterns = [route for route in routes if "{" in route.path]
        plain = [route for route in reversed(routes) if route not in self._patterns]
        self._exact = {(method, route.path): route for route in plain for method in route.methods}
        self._all = routes

    def find(self, method: str, path: str) -> tuple[Handler, Mapping[str, str]]:
        """The handler of a request and its path parameters.

        Raises:
            HTTPError: 404, no such route; 405, the route has other methods, which the header Allow names.
        """
        if (route := self._exact.get((method, path))) is not None:
            return route.handler, {}
        for route in self._patterns:
            if method in route.methods and (match := route.pattern.fullmatch(path)) is not None:
                return route.handler, match.groupdict()
        allowed = [name for route in self._all if route.pattern.fullmatch(path) for name in route.methods]
        if not allowed:
            raise HTTPError(404, "")
        raise HTTPError(405, "", {"Allow": ", ".join(dict.fromkeys(allowed))})


class App:
    """The ASGI application: finds the handler of a request, and answers errors."""

    def __init__(
        self,
        routes: Routes,
        state: object,
        *,
        check: Callable[[Request], Response | None],
        on_error: Callable[[Request, Exception], Response],
        count_error: Callable[[int], None],
    ) -> None:
        """An application without state of its own.

        Args:
            routes: the table of routes.
            state: `Request.state` of all requests.
            check: called before the handler; returns a response in its place, or None.
            on_error: the response to an error of the handler.
            count_error: called with every status of 400 or above.
        """
        self._routes, self._state = routes, state
        self._check, self._on_error, self._count_error = check, on_error, count_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, self._state)
        try:
            response = self._check(request)
            if response is None:
                handler, request.path_params = self._routes.find(request.method, request.path)
                response = await handler(request)
        except Exception as error:
            response = self._on_error(request, error)
        if response.status >= 400:
            self._count_error(response.status)
            if request.awaits_continue:  # the client may send the body or not: what follows is ambiguous
                response = replace(response, headers={**response.headers, "connection": "close"})
        await response.send(send)
