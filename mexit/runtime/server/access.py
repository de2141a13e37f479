"""What happens around every request: the token is checked, and what comes back is counted."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mexit.runtime.server.metrics import Metrics
from mexit.runtime.server.replies import error_reply, internal_error

OPEN_ROUTES = ("/v2/health/live", "/v2/health/ready")  # for load balancers, which hold no token


class BearerToken:
    """Refuses requests without `Authorization: Bearer TOKEN`."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.strip().encode()  # a header's value bears no spaces around it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OPEN_ROUTES or self._holds_token(scope):
            await self._app(scope, receive, send)
            return
        refusal = error_reply("send the header: Authorization: Bearer TOKEN", 401, {"www-authenticate": "Bearer"})
        await refusal(scope, receive, send)

    def _holds_token(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        # Comparing takes as long for a wrong first byte as for a wrong last one.
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token)


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
