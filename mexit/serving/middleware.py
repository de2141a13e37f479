"""What happens around every request: the token is checked, the client named, and what comes back is counted."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mexit.errors import UsageError
from mexit.serving.metrics import Metrics
from mexit.serving.responses import error_reply, internal_error

OPEN_ROUTES = ("/v2/health/live", "/v2/health/ready")  # for load balancers, which hold no token


_IPV6_HOME = 64  # bits of an IPv6 address; the others are anybody's choice


def tokens_of(text: str | None) -> tuple[str, ...]:
    """The tokens of a text that separates them by commas, without the spaces around them. Raises `UsageError`."""
    if text is None:
        return ()
    tokens = tuple(part.strip() for part in text.split(","))
    if not all(tokens):
        raise UsageError("the token is empty: give a long random one, or none to serve this machine only")
    if len(set(tokens)) < len(tokens):
        raise UsageError("a token is given twice: give each client one of its own")
    return tokens


def client_of(request: Request) -> str:
    """Who asks, as the rate limiter tells clients apart: the place of its token, else the address of its peer.

    Of an IPv6 address the network counts. What headers say of addresses is never believed.
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
    return str(ipaddress.ip_network((address, _IPV6_HOME), strict=False))


class BearerToken:
    """Refuses requests without `Authorization: Bearer TOKEN`; notes which token it was, from 1."""

    def __init__(self, app: ASGIApp, tokens: Sequence[str]) -> None:
        self._app = app
        self._tokens = [token.encode() for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["mexit_token"] = place = self._place(scope)
        if scope["path"] in OPEN_ROUTES or place:
            await self._app(scope, receive, send)
            return
        refusal = error_reply("send the header: Authorization: Bearer TOKEN", 401, {"www-authenticate": "Bearer"})
        await refusal(scope, receive, send)

    def _place(self, scope: Scope) -> int:
        """Of the token among those that are good, from 1; 0 for none."""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        # Comparing takes as long for a wrong first byte as for a wrong last one, and for any of the tokens.
        equal = [hmac.compare_digest(token.strip(), good) for good in self._tokens]
        return equal.index(True) + 1 if scheme.lower() == b"bearer" and any(equal) else 0


class ErrorBoundary:
    """Answers for whatever breaks below it, and counts every error status that leaves the server."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            if status:  # half a response is out; all that is left is to cut the connection
                raise
            await internal_error(scope["method"], scope["path"], error)(scope, receive, noting)
        finally:
            if status >= 400:
                self._metrics.failed(status)
