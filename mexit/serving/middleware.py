"""ASGI middleware: bearer tokens, client identity, and answers to unexpected errors."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mexit.errors import UsageError
from mexit.serving.metrics import Metrics
from mexit.serving.responses import error_response, internal_error_response

PUBLIC_ROUTES = ("/v2/health/live", "/v2/health/ready")  # for load balancers, which hold no token
_IPV6_NETWORK_BITS = 64  # a host chooses the other bits of its IPv6 address freely


def parse_tokens(text: str | None) -> tuple[str, ...]:
    """Tokens separated by commas. Raises `UsageError` for an empty or repeated token."""
    if text is None:
        return ()
    tokens = tuple(part.strip() for part in text.split(","))
    if not all(tokens):
        raise UsageError("the token is empty: give a long random one, or none to serve this machine only")
    if len(set(tokens)) < len(tokens):
        raise UsageError("a token is given twice: give each client one of its own")
    return tokens


def client_id(request: Request) -> str:
    """The client's identity for the rate limiter: the number of its token, else its network address.

    An IPv6 client is identified by its /64 network. Headers such as X-Forwarded-For are ignored, because any
    client can set them.
    """
    if "mexit_token" in request.scope:
        return f"token {request.scope['mexit_token']}"
    if request.client is None:
        return ""
    address = ipaddress.ip_address(request.client.host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, _IPV6_NETWORK_BITS), strict=False))


class BearerTokenMiddleware:
    """Answers 401 to requests without a valid `Authorization: Bearer TOKEN`.

    The number of the token, from 1, is stored in the scope as `mexit_token`.
    """

    def __init__(self, app: ASGIApp, tokens: Sequence[str]) -> None:
        self._app = app
        self._tokens = [token.encode() for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["mexit_token"] = number = self._token_number(scope)
        if scope["path"] in PUBLIC_ROUTES or number:
            await self._app(scope, receive, send)
            return
        message = "send the header: Authorization: Bearer TOKEN"
        await error_response(message, 401, {"www-authenticate": "Bearer"})(scope, receive, send)

    def _token_number(self, scope: Scope) -> int:
        """The number of the request's token, from 1; 0 if there is no valid token."""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        # Every token is compared in constant time, so that the time of the answer tells nothing about them.
        matches = [hmac.compare_digest(token.strip(), valid) for valid in self._tokens]
        return matches.index(True) + 1 if scheme.lower() == b"bearer" and any(matches) else 0


class ErrorMiddleware:
    """Answers 500 to unexpected errors, and counts all responses with an error status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 0

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note_status)
        except Exception as error:
            if status:  # the response has begun, so the connection can only be closed
                raise
            response = internal_error_response(scope["method"], scope["path"], error)
            await response(scope, receive, send_and_note_status)
        finally:
            if status >= 400:
                self._metrics.count_error(status)
