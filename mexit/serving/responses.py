"""JSON responses, and errors as `{"error": "..."}` with the HTTP status of the error's class.

A client's mistake is explained in the response. A failure of the server is logged in full and answered with a
fixed sentence, because paths, engine messages and tracebacks help only an attacker.
"""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mexit.errors import DeadlineExceeded, LoadFailed, MexitError, MissingExtra, NotCalibrated, Overloaded
from mexit.serving.request_body import short_repr
from mexit.serving.worker_pool import ClientDisconnected

INTERNAL_ERROR = "internal error: the server's log has the details"
NOT_CALIBRATED = "the model has no thresholds for this engine: only the budget 'full' works"
CLIENT_CLOSED_REQUEST = 499  # nginx's status for the log and metrics; the client has gone
_EXPLAINED = (
    Overloaded,
    DeadlineExceeded,
    MissingExtra,
    LoadFailed,
)  # status 500 or above, and the message is safe to send

_log = logging.getLogger("mexit.server")


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response. Raises `ValueError` for NaN and infinity."""
    content = json.dumps(value, allow_nan=False).encode()
    return Response(content, status, headers, media_type="application/json")


def error_response(message: str, status: int, headers: dict[str, str] | None = None) -> Response:
    """The response `{"error": message}`."""
    return json_response({"error": message}, status, headers)


def internal_error_response(method: str, path: str, error: Exception) -> Response:
    """Log the error with its traceback; the response, status 500, does not describe it."""
    _log.error("%s %s failed", method, short_repr(path), exc_info=error)
    return error_response(INTERNAL_ERROR, 500)


async def _mexit_error(request: Request, error: MexitError) -> Response:
    status = error.http_status
    if isinstance(error, NotCalibrated):
        return error_response(NOT_CALIBRATED, status)
    if status >= 500 and not isinstance(error, _EXPLAINED):
        return internal_error_response(request.method, request.scope["path"], error)
    headers = {"retry-after": str(math.ceil(error.retry_after_s))} if isinstance(error, Overloaded) else None
    return error_response(str(error), status, headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return error_response(f"no such route: {request.method} {short_repr(request.scope['path'])}", 404, headers)
    if error.status_code == 405:
        allowed = headers.get("Allow", "another method")
        return error_response(f"{request.method} is not for this route: use {allowed}", 405, headers)
    return error_response(error.detail, error.status_code, headers)


async def _client_disconnected(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


EXCEPTION_HANDLERS: dict[Any, Any] = {
    MexitError: _mexit_error,
    HTTPException: _http_error,
    ClientDisconnect: _client_disconnected,
    ClientDisconnected: _client_disconnected,
}
