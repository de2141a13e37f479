"""Responses: JSON, and errors as `{"error": "..."}` with the status that the error's class knows.

What a client did wrong is explained to it. What went wrong in here is logged in full and answered with a bare
sentence: paths, engine messages and tracebacks help nobody but an attacker.
"""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mexit.errors import DeadlineExceeded, MexitError, MissingExtra, NotCalibrated, Overloaded
from mexit.serving.strict_json import shown
from mexit.serving.worker_pool import ClientGone

INTERNAL = "internal error: the server's log has the details"
UNCALIBRATED = "the model has no thresholds for this engine: only the budget 'full' works"
CLIENT_GONE = 499  # nobody reads it; nginx's number, for the metrics
_FOR_CLIENTS = (Overloaded, DeadlineExceeded, MissingExtra)  # over 499, and yet nothing to hide

_log = logging.getLogger("mexit.server")


def json_reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response; NaN is a bug, not an answer."""
    content = json.dumps(value, allow_nan=False).encode()
    return Response(content, status, headers, media_type="application/json")


def error_reply(text: str, status: int, headers: dict[str, str] | None = None) -> Response:
    """The one form of an error."""
    return json_reply({"error": text}, status, headers)


def internal_error(method: str, path: str, error: Exception) -> Response:
    """Log everything, tell nothing."""
    _log.error("%s %s failed", method, shown(path), exc_info=error)
    return error_reply(INTERNAL, 500)


async def _mexit_error(request: Request, error: MexitError) -> Response:
    status = error.http_status
    if isinstance(error, NotCalibrated):
        return error_reply(UNCALIBRATED, status)
    if status >= 500 and not isinstance(error, _FOR_CLIENTS):
        return internal_error(request.method, request.scope["path"], error)
    headers = {"retry-after": str(math.ceil(error.retry_after_s))} if isinstance(error, Overloaded) else None
    return error_reply(str(error), status, headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return error_reply(f"no such route: {request.method} {shown(request.scope['path'])}", 404, headers)
    if error.status_code == 405:
        offered = headers.get("Allow", "another method")
        return error_reply(f"{request.method} is not for this route: use {offered}", 405, headers)
    return error_reply(error.detail, error.status_code, headers)


async def _client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


HANDLERS: dict[Any, Any] = {
    MexitError: _mexit_error,
    HTTPException: _http_error,
    ClientDisconnect: _client_gone,
    ClientGone: _client_gone,
}
