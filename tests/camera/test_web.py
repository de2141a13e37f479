"""Requests to web servers: passwords, certificates, and pictures that do not end."""

from __future__ import annotations

import hashlib
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.request import parse_http_list, parse_keqv_list

import pytest
from camera_media import grey_frames, slow_runtime, write_images, write_video
from web_server import Reply, certificate_file, web_server

from mexit.camera.live_stream import LiveSettings
from mexit.camera.pipeline import classify_frames
from mexit.errors import MexitError

USER, PASSWORD = "me", "ge heim@ü"
ADDRESS_USER = "me:ge%20heim%40%C3%BC"
INSECURE = LiveSettings(insecure=True)


def digest_challenge(algorithm: str | None = "MD5", qop: str | None = "auth", scheme: str = "Digest") -> str:
    fields = ['realm="camera"', 'nonce="abc"']
    fields += [f"algorithm={algorithm}"] if algorithm else []
    return f"{scheme} " + ", ".join([*fields, *([f'qop="{qop}"'] if qop else [])])


def is_right_digest(authorization: str) -> bool:
    """Check a digest as RFC 7616 (RFC 2069 without qop) defines it."""
    scheme, _, rest = authorization.partition(" ")
    fields = parse_keqv_list(parse_http_list(rest))
    if scheme != "Digest" or fields["username"] != USER:
        return False
    name = fields.get("algorithm", "MD5").replace("-", "").lower()

    def hashed(text: str) -> str:
        return hashlib.new(name, text.encode()).hexdigest()

    middle = ":".join([fields["nc"], fields["cnonce"], "auth"]) + ":" if "qop" in fields else ""
    secret, request = hashed(f"{USER}:camera:{PASSWORD}"), hashed(f"GET:{fields['uri']}")
    return fields["response"] == hashed(f"{secret}:abc:{middle}{request}")


def camera_with_password(picture: bytes, *challenges: str) -> Callable[[Reply], None]:
    """Gives the picture to requests with the right password in the form of one of the challenges."""

    def answer(reply: Reply) -> None:
        given = reply.headers.get("Authorization", "")
        basic = given == "Basic bWU6Z2UgaGVpbUDDvA==" and any("Basic" in challenge for challenge in challenges)
        if basic or (given.startswith("Digest") and is_right_digest(given)):
            reply.give(picture, Content_Type="image/png")
        else:
            reply.give(status=401, challenges=challenges)

    return answer


@pytest.fixture
def picture(tmp_path: Path) -> bytes:
    [path] = write_images(tmp_path, ["picture.png"])
    return path.read_bytes()


@pytest.mark.parametrize(
    "challenges",
    [
        (digest_challenge(),),
        (digest_challenge(algorithm=None),),
        (digest_challenge(qop=None),),
        (digest_challenge(qop="auth-int, auth"),),
        (digest_challenge("SHA-256"), digest_challenge("MD5")),
        (digest_challenge("SHA-512-256-sess"), digest_challenge("md5")),
        (digest_challenge(scheme="digest"),),
        ('Basic realm="camera"', digest_challenge()),
        ('Basic realm="camera"',),
        ('NTLM realm="camera"', 'basic realm="camera", charset="UTF-8"', 'Basic realm="x"'),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/snap.png", "/cgi-bin/snapshot.cgi?channel=1"])
def test_a_picture_behind_a_password(picture: bytes, challenges: tuple[str, ...], path: str) -> None:
    with web_server(camera_with_password(picture, *challenges)) as server:
        [(frame, result)] = classify_frames(slow_runtime(), server.with_user(ADDRESS_USER) + path)
        assert frame.shape == (20, 30, 3)
        assert result.source == server.url + path.partition("?")[0]
        digest = any(challenge.lower().startswith("digest") for challenge in challenges)
        assert {request.headers["Authorization"].split()[0] for request in server.seen[1::2]} == {
            "Digest" if digest else "Basic"
        }


@pytest.mark.parametrize("challenge", [digest_challenge(), 'Basic realm="camera"', "Bearer", digest_challenge("SHA-1")])
def test_a_wrong_password_is_tried_once(picture: bytes, challenge: str) -> None:
    """Cameras lock accounts after repeated attempts."""
    with web_server(camera_with_password(picture, challenge)) as server:
        with pytest.raises(MexitError, match="Unauthorized: check the user and the password") as error:
            list(classify_frames(slow_runtime(), f"{server.with_user('me:falsch')}/snap.png"))
        assert "falsch" not in repr(error.value)
        assert sum("Authorization" in request.headers for request in server.seen) <= 1


def test_no_password_is_sent_without_a_challenge(picture: bytes) -> None:
    with web_server(lambda reply: reply.give(picture, Content_Type="image/png")) as server:
        list(classify_frames(slow_runtime(), f"{server.with_user('me:geheim')}/snap.png"))
        assert all("Authorization" not in request.headers for request in server.seen)


def test_a_redirection_does_not_carry_the_password_away(picture: bytes) -> None:
    def steal(reply: Reply) -> None:
        reply.give(status=401, challenges=('Basic realm="camera"',))

    with web_server(steal) as thief:
        with (
            web_server(lambda reply: reply.give(status=302, Location=f"{thief.url}/a.png")) as server,
            pytest.raises(MexitError, match="Unauthorized"),
        ):
            list(classify_frames(slow_runtime(), f"{server.with_user('me:geheim')}/snap.png"))
        assert thief.seen
        assert all("Authorization" not in request.headers for request in thief.seen)


def media(reply: Reply, folder: Path) -> None:
    """A picture, a film and MJPEG, by path."""
    if reply.path.startswith("/live"):
        reply.give_mjpeg([(folder / "a.jpg").read_bytes()])
    elif reply.path.startswith("/film"):
        reply.give((folder / "a.mp4").read_bytes(), Content_Type="video/mp4")
    else:
        reply.give((folder / "a.jpg").read_bytes(), Content_Type="image/jpeg")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path, ["a.jpg"])
    write_video(tmp_path / "a.mp4", grey_frames(5), [i / 10 for i in range(5)])
    return tmp_path


@pytest.mark.parametrize("path", ["/snap.jpg", "/snap", "/film", "/film.mp4", "/live", "/live.jpg"])
def test_a_self_signed_certificate(folder: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rule for pictures, films and streams: it is refused, unless it is named or every certificate is accepted."""
    with web_server(lambda reply: media(reply, folder), tls_folder=folder) as server:
        with pytest.raises(
            MexitError, match=r"its certificate is not accepted \(self.signed certificate\): .*--insecure"
        ):
            classify_frames(slow_runtime(), server.url + path)
        _, result = next(classify_frames(slow_runtime(), server.url + path, live=INSECURE))
        assert result.source == server.url + path
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate_file(folder)))
        _, result = next(classify_frames(slow_runtime(), server.url + path))
        assert result.source == server.url + path


def test_a_certificate_of_another_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate_file(folder)))
    with web_server(lambda reply: media(reply, folder), tls_folder=folder) as server:
        for path in ("/snap.jpg", "/film", "/live"):
            with pytest.raises(MexitError, match=r"certificate is not accepted .*not valid for 'localhost'"):
                classify_frames(slow_runtime(), server.url.replace("127.0.0.1", "localhost") + path)


@pytest.mark.parametrize("scheme", ["rtsps", "rtmps"])
def test_the_certificate_of_a_server_of_another_protocol(tmp_path: Path, scheme: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_file(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as server:

        def shake_hands() -> None:
            client, _ = server.accept()
            with client, suppress(OSError):
                context.wrap_socket(client, server_side=True).close()

        thread = threading.Thread(target=shake_hands)
        thread.start()
        address = f"{scheme}://me:geheim@127.0.0.1:{server.getsockname()[1]}/live"
        with pytest.raises(MexitError, match=r"certificate is not accepted .* --insecure") as error:
            classify_frames(slow_runtime(), address)
        thread.join(5)
    assert "geheim" not in str(error.value)


def test_the_option(digits_bundle: Path, folder: Path) -> None:
    with web_server(lambda reply: media(reply, folder), tls_folder=folder) as server:
        command = [sys.executable, "-m", "mexit", "camera", str(digits_bundle), "--source", f"{server.url}/film"]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
        accepted = subprocess.run([*command, "--insecure", "--json"], capture_output=True, text=True, timeout=60)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    assert "certificate" in refused.stderr
    assert "--insecure" in refused.stderr
    assert (accepted.returncode, accepted.stderr) == (0, "")
    assert '"frames": 5' in accepted.stdout


def test_a_picture_that_breaks_off(picture: bytes) -> None:
    def answer(reply: Reply) -> None:
        reply.send_response(200)
        reply.send_header("Content-Type", "image/png")
        reply.send_header("Content-Length", str(len(picture) + 7))
        reply.end_headers()
        reply.wfile.write(picture)
        reply.close_connection = True

    with web_server(answer) as server, pytest.raises(MexitError, match="7 bytes are missing at its end"):
        list(classify_frames(slow_runtime(), f"{server.url}/snap.png"))
