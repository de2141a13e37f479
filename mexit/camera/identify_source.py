"""What a web address gives: a picture, a video that ends, or a live stream. The server says it, not the suffix."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from email.message import Message
from pathlib import PurePosixPath
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from mexit.camera.decode import import_av
from mexit.camera.live_stream import LiveSettings, open_source
from mexit.camera.parse_source import Source
from mexit.camera.web import REQUEST_ERRORS, TLS_PORTS, check_certificate, explain, open_url
from mexit.errors import MexitError

_PLAYLISTS = (".m3u8", ".m3u", ".mpd")
_PLAYLIST_TYPES = ("mpegurl", "dash+xml")
_FINAL_STATUSES = (401, 403, 404, 410)  # no later attempt will do better


def identify_source(source: Source, settings: LiveSettings) -> Source:
    """Ask a web server what its address gives; check the certificate of other servers with TLS.

    A response in several parts (`multipart/x-mixed-replace`, MJPEG) is a live stream. One of the type `image/*` is a
    picture. One with a length, or a video whose duration is known, is a file that ends. Everything else is live.

    Args:
        source: a parsed source; one that is not on the web is returned unchanged.
        settings: `open_timeout_s`, `read_timeout_s` and `insecure` apply.

    Raises:
        NotFound, MexitError: the address does not exist, the password or the certificate is refused, or a file's
            server cannot be reached. A stream whose server cannot be reached now is no error: it is tried again.
    """
    scheme = source.address.partition("://")[0].lower()
    if scheme in ("http", "https") and source.kind in ("download", "stream"):
        return _identify_web_address(source, settings)
    if scheme in TLS_PORTS and not settings.insecure:
        check_certificate(source.address, source.name, settings.open_timeout_s)
    return source


def _identify_web_address(source: Source, settings: LiveSettings) -> Source:
    try:
        with open_url(source.address, settings.open_timeout_s, insecure=settings.insecure) as response:
            headers = response.headers
    except REQUEST_ERRORS as error:
        failure = explain(error, source.name)
        if source.kind == "download" or _is_final(error):
            raise failure from None
        return source
    content_type = headers.get_content_type() if "Content-Type" in headers else ""
    if content_type.startswith("multipart/"):
        return replace(source, kind="stream", is_picture=False)
    if content_type.startswith("image/") or (source.is_picture and not content_type.startswith(("video/", "audio/"))):
        return replace(source, kind="download", is_picture=True)
    ends = _has_length(headers, content_type, source) or _has_duration(source, settings)
    return replace(source, kind="download" if ends else "stream", is_picture=False)


def _is_final(error: Exception) -> bool:
    if isinstance(error, HTTPError):
        return error.code in _FINAL_STATUSES
    reason = error.reason if isinstance(error, URLError) else error
    return type(reason).__name__ == "SSLCertVerificationError"


def _has_length(headers: Message, content_type: str, source: Source) -> bool:
    """Whether the response announces its length, and is not the list of a stream's parts."""
    suffix = PurePosixPath(urlsplit(source.address).path).suffix.lower()
    is_playlist = suffix in _PLAYLISTS or content_type.endswith(_PLAYLIST_TYPES)
    return "Content-Length" in headers and not is_playlist


def _has_duration(source: Source, settings: LiveSettings) -> bool:
    try:
        with closing(open_source(source, settings)) as container:
            return container.duration is not None
    except (import_av().FFmpegError, MexitError):
        return False
