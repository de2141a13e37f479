"""TLS of the server."""

from __future__ import annotations

import ssl
from pathlib import Path

from mexit.errors import NotFound, UsageError
from mexit.serving.secret_file import check_secret, read_secret

_KEY = "the private key of TLS"


def server_context(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """TLS 1.2 and later with a certificate; None without one.

    Args:
        cert: PEM file of the certificate, followed by those that lead to the root.
        key: PEM file of the private key, which is not encrypted; None: it is in `cert`.

    Raises:
        UsageError: a key without a certificate, files that do not belong together, an encrypted key, or a key that
            other users can read.
        NotFound: there is no such file.
    """
    if cert is None:
        if key is not None:
            raise UsageError("--tls-key needs --tls-cert FILE, the certificate of the key")
        return None
    if not cert.is_file():
        raise NotFound(f"the certificate of TLS: there is no file {cert}")
    check_secret(key or cert, _KEY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except OSError as error:  # ssl.SSLError is one
        reason = getattr(error, "reason", None) or error.strerror or "no certificate and key in PEM"
        raise UsageError(
            f"the certificate {cert} and the key {key or cert} cannot be used ({reason}): give PEM files that belong "
            "together"
        ) from None
    return context


def read_pem(cert: Path | None, key: Path | None) -> tuple[bytes, bytes] | None:
    """The certificate chain and the private key in PEM, for gRPC; arguments and errors as `server_context`."""
    if server_context(cert, key) is None or cert is None:
        return None
    return cert.read_bytes(), read_secret(key or cert, _KEY)


def _no_password() -> str:
    """OpenSSL would ask for the password in the terminal."""
    raise UsageError(f"{_KEY} is encrypted: give one without a password, in a file that only you can read")
