"""A web server for the camera tests, with or without TLS, that answers as a test says."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# Self-signed, for 127.0.0.1, valid for a hundred years; the key protects nothing.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBiTCCATCgAwIBAgIUAb4UdigyqottVpAj9ZOXUNf+leMwCgYIKoZIzj0EAwIw
ETEPMA0GA1UEAwwGY2FtZXJhMCAXDTI2MTEyNjIxMTAwMFoYDzIxMjYxMTAyMjEx
MDAwWjARMQ8wDQYDVQQDDAZjYW1lcmEwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC
AAQB6xFdbTxZyPCPwGUhjRZdGJPll7j/Snp6fFfCHdYOCbZW1PdiX0+f5J+4kOnB
mIK7Jn1RomHAMBUwEiy3A6uSo2QwYjAdBgNVHQ4EFgQUDJLX8g+qux9w5TSNdN3n
+ogkDiAwHwYDVR0jBBgwFoAUDJLX8g+qux9w5TSNdN3n+ogkDiAwDwYDVR0TAQH/
BAUwAwEB/zAPBgNVHREECDAGhwR/AAABMAoGCCqGSM49BAMCA0cAMEQCIBza8rE9
Os1ZOx5jp2GVha1d0QF58q38ANZnvzzYQZCyAiAZtb2QL1ZQj07GJ2xEm6zrVLpk
DZVHZ69ob83kPABICA==
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQga3/kyC0XLgKCHL3z
mn8ga7/B+K2WHel12gV3W9Ii89ChRANCAAQB6xFdbTxZyPCPwGUhjRZdGJPll7j/
Snp6fFfCHdYOCbZW1PdiX0+f5J+4kOnBmIK7Jn1RomHAMBUwEiy3A6uS
-----END PRIVATE KEY-----
"""
MJPEG = "multipart/x-mixed-replace; boundary=frame"


class Reply(BaseHTTPRequestHandler):
    """One request and the means to answer it."""

    protocol_version = "HTTP/1.1"
    answer: Callable[[Reply], object]
    body: bytes
    over: threading.Event
    seen: list[Reply]

    def do_GET(self) -> None:
        self.seen.append(self)
        with suppress(OSError):
            type(self).answer(self)

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def give(
        self, content: bytes = b"", status: int = 200, *, challenges: tuple[str, ...] = (), **headers: str
    ) -> None:
        """Answer with a length."""
        self.send_response(status)
        for challenge in challenges:
            self.send_header("WWW-Authenticate", challenge)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def give_chunked(self, content: bytes, content_type: str) -> None:
        """Answer without a length."""
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content))

    def give_mjpeg(self, pictures: list[bytes], interval_s: float = 0.02) -> None:
        """Answer with pictures, over and over."""
        self.send_response(200)
        self.send_header("Content-Type", MJPEG)
        self.end_headers()
        while not self.over.is_set():
            for picture in pictures:
                head = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(picture)
                self.wfile.write(head + picture + b"\r\n")
                self.over.wait(interval_s)


class WebServer:
    """A running server.

    Attributes:
        url: its URL, without a path.
        seen: the requests so far.
    """

    def __init__(self, url: str, seen: list[Reply]) -> None:
        self.url, self.seen = url, seen

    def with_user(self, user: str) -> str:
        """The URL with user and password."""
        return self.url.replace("://", f"://{user}@")


@contextmanager
def web_server(answer: Callable[[Reply], object], *, tls_folder: Path | None = None) -> Iterator[WebServer]:
    """Serve on a free port; with a folder for the certificate, over TLS."""
    over, seen = threading.Event(), list[Reply]()
    handler = type("Handler", (Reply,), {"answer": staticmethod(answer), "over": over, "seen": seen})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if tls_folder is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate_file(tls_folder))
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    scheme = "http" if tls_folder is None else "https"
    try:
        yield WebServer(f"{scheme}://127.0.0.1:{server.server_address[1]}", seen)
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join(5)


def certificate_file(folder: Path) -> Path:
    """A file with the certificate and its key."""
    path = folder / "certificate.pem"
    path.write_text(CERTIFICATE + KEY)
    return path
