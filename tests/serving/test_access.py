"""Who reaches the server, and how: TLS, Unix sockets and files of tokens."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import INFER, Server, infer_body, start, wait_until

from mexit.errors import MexitError, NotFound, UsageError
from mexit.flows.serve import ServeOptions, serve_bundle
from mexit.serving.limits import Limits
from mexit.serving.middleware import Tokens, read_tokens
from mexit.serving.secret_file import read_secret
from mexit.serving.tls import server_context
from mexit.serving.unix_socket import UnixSocket

GREY = infer_body(np.full((1, 1, 8, 8), 0.5, np.float32))
CERTIFICATE = Path(__file__).with_name("certificate.pem")  # of localhost and 127.0.0.1, with its key, for tests only


@pytest.fixture
def secret(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file that only its owner can read, by default the certificate with its key."""

    def write(name: str = "server.pem", content: bytes = CERTIFICATE.read_bytes()) -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        path.chmod(0o600)
        return path

    return write


def trusting() -> ssl.SSLContext:
    """The settings of a client that trusts the server's certificate alone."""
    return ssl.create_default_context(cafile=str(CERTIFICATE))


def ask(connection: http.client.HTTPConnection, method: str = "POST", path: str = INFER, body: Any = GREY) -> int:
    """The status of one request on a connection that stays open."""
    connection.request(method, path, body)
    response = connection.getresponse()
    response.read()
    return response.status


@pytest.mark.parametrize("workers", [0, 1], ids=["one process", "worker"])
def test_tls(digits_bundle: Path, tmp_path: Path, secret: Callable[..., Path], workers: int) -> None:
    """Requests in TLS are answered on one connection. Others are closed, also those that stop in the handshake."""
    with start(digits_bundle, tmp_path, tls_cert=str(secret()), workers=workers, limits={"head_s": 0.5}) as server:
        assert server.url.startswith("https://127.0.0.1:")
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as silent:
            connection = http.client.HTTPSConnection("localhost", server.port, timeout=10, context=trusting())
            assert [ask(connection) for _ in range(3)] == [200] * 3
            assert connection.sock.version() == "TLSv1.3"  # type: ignore[attr-defined]
            connection.close()
            assert silent.recv(100) == b""
        plain = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        with pytest.raises((http.client.HTTPException, OSError)):
            ask(plain, "GET", "/v2", None)
        plain.close()
        assert server.stop() == 0
        assert server.errors == ""


def split(secret: Callable[..., Path]) -> tuple[Path, Path]:
    """The certificate and its key in two files."""
    certificate, _, key = CERTIFICATE.read_text().partition("-----BEGIN PRIVATE KEY-----")
    return (
        secret("certificate.pem", certificate.encode()),
        secret("key.pem", ("-----BEGIN PRIVATE KEY-----" + key).encode()),
    )


def test_a_key_in_a_file_of_its_own(secret: Callable[..., Path]) -> None:
    """All users may read the certificate, and only the owner the key."""
    certificate, key = split(secret)
    certificate.chmod(0o644)
    context = server_context(certificate, key)
    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert server_context(None, None) is None
    key.chmod(0o644)
    with pytest.raises(UsageError, match=r"other users can read or change .*key\.pem \(mode 644\): chmod 6[04]0 "):
        server_context(certificate, key)
    with pytest.raises(UsageError, match="cannot be used"):
        server_context(certificate, None if os.name == "nt" else secret("other.pem", b"no key"))
    with pytest.raises(UsageError, match="--tls-key needs --tls-cert"):
        server_context(None, key)
    with pytest.raises(NotFound, match="there is no file"):
        server_context(certificate.with_name("absent.pem"), key)


def test_an_encrypted_key(secret: Callable[..., Path]) -> None:
    """OpenSSL does not ask for its password, which would stop a server that starts with the machine."""
    encrypted = Path(__file__).with_name("encrypted-key.pem").read_bytes()
    certificate, _ = split(secret)
    with pytest.raises(UsageError, match="is encrypted"):
        server_context(certificate, secret("encrypted.pem", encrypted))


class UnixConnection(http.client.HTTPConnection):
    """A connection to a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(str(self._path))


@pytest.mark.parametrize("workers", [0, 1], ids=["one process", "worker"])
def test_a_unix_socket(digits_bundle: Path, tmp_path: Path, workers: int) -> None:
    """No port is open. The file is the owner's, and is removed at the end; after a kill it is replaced."""
    path = tmp_path / "mexit.sock"
    for end in ("killed", "stopped"):
        with start(digits_bundle, tmp_path, host=f"unix:{path}", workers=workers) as server:
            assert server.url == f"unix:{path}"
            assert stat.S_IMODE(path.stat().st_mode) & 0o007 == 0
            connection = UnixConnection(path)
            assert [ask(connection) for _ in range(2)] == [200] * 2
            connection.close()
            if end == "killed":
                server.process.kill()
                server.process.wait()
                assert path.exists()
                wait_until(lambda: not is_served(path))
            else:
                assert server.stop() == 0
    assert not path.exists()


def is_served(path: Path) -> bool:
    with contextlib.closing(UnixConnection(path)) as connection, contextlib.suppress(OSError):
        connection.connect()
        return True
    return False


def test_unix_sockets_that_cannot_be_bound(tmp_path: Path) -> None:
    """A file is not overwritten, and neither is the socket of a server that runs."""
    file, path = tmp_path / "file", tmp_path / "x.sock"
    file.write_text("kept")
    with pytest.raises(UsageError, match="is no socket"):
        UnixSocket(file)
    with pytest.raises(UsageError, match="cannot listen on"):
        UnixSocket(tmp_path / "absent" / "x.sock")
    with pytest.raises(UsageError, match=r"cannot listen on .*too long"):
        UnixSocket(tmp_path / ("x" * 200))
    first = UnixSocket(path)
    first.listen()
    with pytest.raises(UsageError, match="a server listens on"):
        UnixSocket(path)
    path.unlink()
    with UnixSocket(path):
        first.close()
        assert path.exists()
    assert not path.exists()
    assert file.read_text() == "kept"


def test_a_file_of_tokens(secret: Callable[..., Path]) -> None:
    path = secret("tokens", b"# clients\n\nalpha\n  beta \r\ngamma\tadmin\n#delta\nadmin\n")
    assert read_tokens(None, path) == Tokens(("alpha", "beta", "gamma", "admin"), ("gamma",))
    assert read_tokens("one, two", None) == Tokens(("one", "two"), ("one",))
    assert read_tokens(None, None) == Tokens()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no token: write one a line"),
        (b"# none\n\n", "has no token"),
        (b"one\none\n", "has a token twice"),
        (b"one\nhidden word\n", r"line 2 of the token file .*: expected TOKEN or TOKEN admin$"),
        (b"hidden\xff\n", "line 1 of the token file"),
        (b"x" * 2**21, "expected at most 1048576 bytes"),
    ],
)
def test_files_of_tokens_that_are_refused(secret: Callable[..., Path], content: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        read_tokens(None, secret("tokens", content))
    assert "hidden" not in str(raised.value)


def test_a_secret_is_the_owners(secret: Callable[..., Path]) -> None:
    path = secret("tokens", b"one")
    assert read_secret(path, "the tokens") == b"one"
    for mode in (0o604, 0o602, 0o620):
        path.chmod(mode)
        with pytest.raises(UsageError, match=f"other users can read or change .* \\(mode {mode:o}\\): chmod 6[04]0 "):
            read_secret(path, "the tokens")
    with pytest.raises(UsageError, match="not both"):
        read_tokens("one", path)
    for absent, error in ((path.parent / "absent", NotFound), (path.parent, UsageError)):
        with pytest.raises(error):
            read_secret(absent, "the tokens")


@pytest.fixture
def with_tokens(digits_bundle: Path, tmp_path: Path, secret: Callable[..., Path]) -> Iterator[Server]:
    """A server whose third token may load models."""
    path = secret("tokens", b"alpha\nbeta\ngamma admin\n")
    with start(digits_bundle, tmp_path, token_file=str(path), workers=1, host="0.0.0.0") as server:
        path.unlink()  # a worker that is replaced has the tokens of the others
        yield server


def test_tokens_of_a_file_and_the_admin(with_tokens: Server) -> None:
    def status(token: str, path: str = INFER, body: bytes = GREY) -> int:
        return with_tokens.ask("POST", path, body, {"Authorization": f"Bearer {token}"})[0]

    assert [status(token) for token in ("alpha", "gamma", "delta", "gamma admin", "")] == [200, 200, 401, 401, 401]
    load = "/v2/repository/models/digits/load"
    assert [status(token, load, b"") for token in ("alpha", "gamma", "delta")] == [403, 200, 401]


def test_a_body_after_100_continue(server: Server) -> None:
    """The body is sent after the status 100. A request that is refused before it is read gets no 100, and closes."""
    expecting = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: "
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(f"{expecting}{len(GREY)}\r\n\r\n".encode())
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(GREY)
        assert connection.recv(12) == b"HTTP/1.1 200"
        connection.sendall(f"{expecting}{2**40}\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(1000), b""))
    head, _, error = answer[answer.index(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"\r\nconnection: close\r\n" in head
    assert b"found 1099511627776" in error


def test_idle_connections_stay_longer_than_those_of_proxies(digits_bundle: Path, tmp_path: Path) -> None:
    """By default more than 75 s, nginx's time; the limit of the server counts."""
    assert Limits().keep_alive_s > 75
    with start(digits_bundle, tmp_path, limits={"keep_alive_s": 1}) as server:
        connection = server.connect()
        assert ask(connection) == 200
        time.sleep(0.3)
        assert ask(connection) == 200
        assert connection.sock.recv(1) == b""  # after a second
        connection.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tls_key": Path("absent.pem")}, "--tls-key needs --tls-cert"),
        ({"tls_cert": Path("absent.pem")}, "there is no file absent.pem"),
        ({"token_file": Path("absent")}, "there is no file absent"),
        ({"host": "unix:"}, "cannot listen on|is no socket"),
        ({"host": "unix:x", "grpc_port": 0}, "gRPC needs a host with ports"),
        ({"tls_cert": Path("absent.pem"), "grpc_port": 0}, "there is no file absent.pem"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_servers_that_do_not_start(digits_bundle: Path, options: dict[str, Any], message: str, workers: int) -> None:
    with pytest.raises(MexitError, match=message):
        serve_bundle(digits_bundle, ServeOptions(**{"port": 0, "workers": workers, **options}))


def test_the_command_on_a_unix_socket(digits_bundle: Path, tmp_path: Path) -> None:
    """The printed command of curl names the socket."""
    path = tmp_path / "a b.sock"
    command = [sys.executable, "-m", "mexit", "serve", str(digits_bundle), "--host", f"unix:{path}", "--max-body", "1"]
    with subprocess.Popen([*command, "--workers", "0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline(), process.stdout.readline()]
        connection = UnixConnection(path)
        connection.putrequest("POST", INFER)
        connection.putheader("Content-Length", str(2**20 + 1))
        connection.endheaders()
        response = connection.getresponse()
        assert "at most 1048576 bytes" in json.loads(response.read())["error"]
        connection.close()
        process.terminate()
        lines += process.communicate(timeout=20)[0].splitlines()
    assert process.returncode == 0
    assert f"curl --unix-socket '{path}' " in "".join(lines)
