"""JSON responses, and errors as `{"error": "..."}` with the HTTP status of the error's class.

A client's mistake is explained in the response. A failure of the server is logged in full and answered with a
fixed sentence, because paths, engine messages and tracebacks help only an attacker.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from mexit.errors import DeadlineExceeded, LoadFailed, MexitError, MissingExtra, NotCalibrated, Overloaded
from mexit.serving.asgi import ClientDisconnected, HTTPError, Request, Response
from mexit.serving.request_body import short_repr

INTERNAL_ERROR = "internal error: the server's log has the details"
NOT_CALIBRATED = "the model has no thresholds for this engine: only the budget 'full' works"
CLIENT_CLOSED_REQUEST = 499  # nginx's status for the log and metrics; the client has gone
# Status 500 or above, and the message is safe to send.
_EXPLAINED = (Overloaded, DeadlineExceeded, MissingExtra, LoadFailed)

_log = logging.getLogger("mexit.server")


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response. Raises `ValueError` for NaN and infinity."""
    content = json.dumps(value, allow_nan=False).encode()
    return Response(content, status, {**(headers or {}), "content-type": "application/json"})


def error_response(message: str, status: int, headers: Mapping[str, str] | None = None) -> Response:
    """The response `{"error": message}`."""
    return json_response({"error": message}, status, headers)


def response_to_error(request: Request, error: Exception) -> Response:
    """The response to a request whose handler raised an error."""
    if isinstance(error, HTTPError):
        return _http_error(request, error)
    if isinstance(error, ClientDisconnected):
        return Response(status=CLIENT_CLOSED_REQUEST)
    status, message = explain(error, f"{request.method} {short_repr(request.path)}")
    headers = {"retry-after": str(math.ceil(error.retry_after_s))} if isinstance(error, Overloaded) else None
    return error_response(message, status, headers)


def explain(error: Exception, request: str) -> tuple[int, str]:
    """The status of HTTP of an error, and its message for the client.

    A failure of the server has status 500 and a fixed message; it is logged with its traceback and with `request`,
    which names the request.
    """
    if isinstance(error, NotCalibrated):
        return error.http_status, NOT_CALIBRATED
    if isinstance(error, MexitError) and (error.http_status < 500 or isinstance(error, _EXPLAINED)):
        return error.http_status, str(error)
    _log.error("%s failed", request, exc_info=error)
    return 500, INTERNAL_ERROR


def _http_error(request: Request, error: HTTPError) -> Response:
    message = str(error)
    if error.status == 404:
        message = f"no such route: {request.method} {short_repr(request.path)}"
    elif error.status == 405:
        message = f"{request.method} is not for this route: use {error.headers['Allow']}"
    return error_response(message, error.status, error.headers)
