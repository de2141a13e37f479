"""Requests to web servers: authentication, certificates, and the bytes of a picture.

One rule holds for all addresses with TLS (https, rtsps, rtmps): the certificate must be valid, unless
`LiveSettings.insecure` is set. A server that asks for a password gets Digest where it offers an algorithm that is
known, else Basic; the password goes to no other server.
"""

from __future__ import annotations

import base64
import hashlib
import socket
import ssl
import time
from collections.abc import Callable
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit
from urllib.request import (
    BaseHandler,
    HTTPDigestAuthHandler,
    HTTPPasswordMgrWithDefaultRealm,
    HTTPRedirectHandler,
    HTTPSHandler,
    Request,
    build_opener,
    parse_http_list,
    parse_keqv_list,
)

from mexit.core.versions import VERSION
from mexit.data.preprocess import MAX_ENCODED_BYTES
from mexit.errors import MexitError, NotFound, TooLarge

TLS_PORTS = {"https": 443, "rtsps": 322, "rtmps": 443}
REQUEST_ERRORS = (OSError, ValueError, HTTPException)  # of `open_url` and of reading its response
_PICTURE_S = 60.0  # for one picture, after the server has answered
_CHUNK_BYTES = 1 << 16
_HEADERS = {"User-Agent": f"mexit/{VERSION}"}  # some servers refuse Python's own
_CERTIFICATE_FILES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
_HASHES: dict[str, str] = {"MD5": "md5", "SHA": "sha1", "SHA-256": "sha256", "SHA-512-256": "sha512_256"}
CHECK_PASSWORD = "check the user and the password"


class AccessRefused(MexitError):
    """A camera or its server refuses user and password; cameras lock accounts after repeated attempts."""


def open_url(url: str, timeout_s: float, *, insecure: bool) -> HTTPResponse:
    """Send a GET request; return the response, whose body is not read yet.

    Args:
        url: http or https, possibly with user and password.
        timeout_s: for each step of the network, seconds.
        insecure: accept any certificate.

    Raises:
        OSError, ValueError, HTTPException: the request failed; their texts may hold the URL, see `explain`.
    """
    return _request(url, timeout_s, insecure=insecure)


def post_json(url: str, body: bytes, timeout_s: float) -> None:
    """Send JSON by POST; a redirect is an error, because it would be followed by a GET without the content.

    Args:
        url: http or https, possibly with user and password.
        body: JSON text in UTF-8.
        timeout_s: for each step of the network, seconds.

    Raises:
        OSError, ValueError, HTTPException: the request failed, or its status is not 2xx (`HTTPError`).
    """
    with _request(url, timeout_s, _NoRedirect(), insecure=False, body=body):
        pass


def _request(
    url: str, timeout_s: float, *handlers: BaseHandler, insecure: bool, body: bytes | None = None
) -> HTTPResponse:
    parts = urlsplit(url)
    credentials, _, host = parts.netloc.rpartition("@")
    bare = parts._replace(netloc=host, fragment="")
    context = tls_context(insecure=insecure)
    opener = build_opener(HTTPSHandler(context=context), _Authentication(bare, credentials), *handlers)
    headers = _HEADERS if body is None else {**_HEADERS, "Content-Type": "application/json"}
    response: HTTPResponse = opener.open(Request(urlunsplit(bare), body, headers), timeout=timeout_s)
    return response


def explain(error: Exception, name: str) -> MexitError:
    """The error of `open_url` without the URL: what failed, and what to type.

    Args:
        error: one of `REQUEST_ERRORS`.
        name: name of the address without credentials.
    """
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return certificate_error(reason, name)
    if isinstance(error, HTTPError):
        if error.code == 404:
            return NotFound(f"{name} does not exist (404)")
        if error.code in (401, 403):
            return AccessRefused(f"{name} cannot be fetched: {reason}: {CHECK_PASSWORD}")
        return MexitError(f"{name} cannot be fetched: {reason}")
    return MexitError(f"{name} cannot be fetched: {network_reason(reason)}")


def network_reason(error: object) -> str:
    """What went wrong with a connection, in a few words that hold no address."""
    if isinstance(error, ssl.SSLCertVerificationError):
        why = error.verify_message or "not valid"
        return f"its certificate is not accepted ({why}): name a file with it in the variable SSL_CERT_FILE"
    return getattr(error, "strerror", None) or (error if isinstance(error, str) else type(error).__name__)


def certificate_error(error: ssl.SSLCertVerificationError, name: str) -> MexitError:
    """The error for a certificate that is not valid; it names both ways out."""
    return MexitError(
        f"{name}: its certificate is not accepted ({error.verify_message or 'not valid'}): name a file with the "
        "certificate in the variable SSL_CERT_FILE, or type --insecure (in Python LiveSettings(insecure=True)) to "
        "accept any certificate"
    )


def download(url: str, name: str, timeout_s: float, *, insecure: bool) -> bytes:
    """The bytes of a picture on the web.

    Raises:
        NotFound, MexitError: the address cannot be read, or the picture does not end.
        TooLarge: the picture has more than `MAX_ENCODED_BYTES` bytes.
    """
    content = bytearray()
    try:
        with open_url(url, timeout_s, insecure=insecure) as response:
            end_s = time.monotonic() + _PICTURE_S
            while chunk := response.read1(_CHUNK_BYTES):
                content += chunk
                if len(content) > MAX_ENCODED_BYTES:
                    raise TooLarge(f"{name} has more than {MAX_ENCODED_BYTES} bytes")
                if time.monotonic() > end_s:
                    raise MexitError(f"{name} is no picture that ends: it goes on after {_PICTURE_S:g} s")
            if response.length:
                raise MexitError(f"{name} cannot be fetched: {response.length} bytes are missing at its end")
    except REQUEST_ERRORS as error:
        raise explain(error, name) from None
    return bytes(content)


def tls_context(*, insecure: bool) -> ssl.SSLContext:
    """TLS as Python does it: certificates of the system or of SSL_CERT_FILE are trusted, unless `insecure`."""
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def tls_options(scheme: str, *, insecure: bool) -> dict[str, str]:
    """FFmpeg's options for the same rule."""
    if scheme not in TLS_PORTS:
        return {}
    trusted = [path for path in (ssl.get_default_verify_paths().cafile, *_CERTIFICATE_FILES) if path]
    files = [path for path in trusted if Path(path).is_file()]
    return {"tls_verify": "0" if insecure else "1", **({"ca_file": files[0]} if files else {})}


def check_certificate(url: str, name: str, timeout_s: float) -> None:
    """Connect to a server with TLS once, since FFmpeg does not tell a bad certificate from a lost connection.

    Raises:
        MexitError: the certificate is not valid. A server that cannot be reached is no error here.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        with (
            socket.create_connection((host, parts.port or TLS_PORTS[parts.scheme]), timeout_s) as plain,
            tls_context(insecure=False).wrap_socket(plain, server_hostname=host),
        ):
            return
    except ssl.SSLCertVerificationError as error:
        raise certificate_error(error, name) from None
    except (OSError, ValueError):
        return


class _NoRedirect(HTTPRedirectHandler):
    """Refuses to be sent to another address."""

    def redirect_request(self, *_: object) -> None:
        return None


class _Authentication(HTTPDigestAuthHandler):
    """Answers one challenge of a server (status 401), because cameras lock accounts after repeated attempts."""

    def __init__(self, address: SplitResult, credentials: str) -> None:
        passwords = HTTPPasswordMgrWithDefaultRealm()
        super().__init__(passwords)
        self._server = (address.scheme, address.netloc)
        user, _, password = credentials.partition(":")
        self._credentials = (unquote(user), unquote(password)) if credentials else None
        if self._credentials is not None:
            passwords.add_password(None, f"{address.scheme}://{address.netloc}", *self._credentials)

    def http_error_401(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message
    ) -> Any:  # urllib's handlers return a response, or None for the next handler
        del fp, code, msg
        challenges = headers.get_all("WWW-Authenticate", [])
        if self._credentials is None or (req.type, req.host) != self._server or req.has_header("Authorization"):
            return None
        for challenge in challenges:
            if challenge.lower().startswith("digest ") and _algorithm(challenge) in _HASHES:
                return self.retry_http_digest_auth(req, challenge)
        if any(challenge.lower().startswith("basic") for challenge in challenges):
            encoded = base64.b64encode(":".join(self._credentials).encode()).decode()
            req.add_unredirected_header("Authorization", f"Basic {encoded}")
            return self.parent.open(req, timeout=req.timeout)
        return None

    def get_authorization(self, req: Request, chal: Any) -> Any:
        """The header's value; quality lists of some cameras have spaces, which urllib does not expect."""
        if "qop" in chal:
            chal["qop"] = chal["qop"].replace(" ", "")
        return super().get_authorization(req, {**chal, "algorithm": chal.get("algorithm", "MD5").upper()})

    def get_algorithm_impls(self, algorithm: str) -> Any:
        """Hash and keyed hash of an algorithm of RFC 7616; urllib has MD5 and SHA for ASCII only."""

        def hashed(text: str) -> str:
            return hashlib.new(_HASHES[algorithm], text.encode(), usedforsecurity=False).hexdigest()

        keyed: Callable[[str, str], str] = lambda secret, data: hashed(f"{secret}:{data}")  # noqa: E731
        return hashed, keyed


def _algorithm(challenge: str) -> str:
    try:
        fields = parse_keqv_list(list(filter(None, parse_http_list(challenge.partition(" ")[2]))))
    except ValueError:
        return ""
    return str(fields.get("algorithm", "MD5")).upper()
