"""The files of the dashboard, with headers that let a browser load nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import PurePath

from mexit.serving.asgi import HTTPError, Response

INDEX = "index.html"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# `blob:` is for pictures, which are sent from the page or fetched with the token in a header.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def dashboard_file(name: str) -> Response:
    """A file of the dashboard. Raises `HTTPError` 404 for any other name."""
    try:
        return _files()[name]
    except KeyError:
        raise HTTPError(404, "") from None


@cache
def _files() -> Mapping[str, Response]:
    folder = resources.files("mexit.serving") / "dashboard"
    return {
        file.name: Response(file.read_bytes(), headers=_headers(TYPES[PurePath(file.name).suffix]))
        for file in folder.iterdir()
        if PurePath(file.name).suffix in TYPES
    }


def _headers(kind: str) -> Mapping[str, str]:
    return {
        "content-type": kind,
        "content-security-policy": _POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
