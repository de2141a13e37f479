"""Files on the web: downloaded once, answered like files on disk, the password only in a header."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from camera_media import grey_frames, slow_runtime, write_images, write_video

from mexit.camera.live_stream import LiveSettings
from mexit.camera.pipeline import classify_frames
from mexit.errors import Damaged, MexitError, NotFound

AUTHORIZATION = "Basic " + base64.b64encode(b"me:ge heim").decode()


class Files(BaseHTTPRequestHandler):
    """Serves a folder to requests with the password."""

    folder: Path

    def do_GET(self) -> None:
        path = self.folder / self.path.partition("?")[0].lstrip("/")
        if self.headers.get("Authorization") != AUTHORIZATION:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="files"')
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif not path.exists():
            self.send_error(404)
        else:
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The URL, with a password, of a server with the files of `tmp_path`."""
    handler = type("Handler", (Files,), {"folder": tmp_path})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://me:ge%20heim@127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join(5)


def test_an_image(web: str, tmp_path: Path) -> None:
    [path] = write_images(tmp_path, ["a.png"])
    inputs: list[object] = []

    def runtime(image: object, **options: object) -> list[object]:
        inputs.append(image)
        return slow_runtime()(image, **options)

    [(frame, result)] = classify_frames(runtime, f"{web}/a.png?size=full")  # type: ignore[arg-type]
    assert inputs == [path.read_bytes()]
    assert frame.shape == (20, 30, 3)
    assert result.source == f"http://{web.partition('@')[2]}/a.png"


def test_a_video(web: str, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", grey_frames(12), [0.1 + i / 10 for i in range(12)])
    results = [result for _, result in classify_frames(slow_runtime(0.01), f"{web}/a.mp4")]
    assert [result.frame_index for result in results] == list(range(12))
    np.testing.assert_allclose([result.time_s for result in results], [0.1 + i / 10 for i in range(12)], atol=1e-5)


@pytest.mark.parametrize("name", ["gone.png", "gone.mp4"])
def test_a_missing_file(web: str, name: str) -> None:
    with pytest.raises(NotFound, match=f"{name} does not exist") as error:
        list(classify_frames(slow_runtime(), f"{web}/{name}"))
    assert "ge%20heim" not in repr(error.value)


@pytest.mark.parametrize("name", ["a.png", "a.mp4"])
def test_a_wrong_password(web: str, name: str) -> None:
    address = f"{web.replace('ge%20heim', 'falsch')}/{name}"
    with pytest.raises(MexitError, match=r"Unauthorized") as error:
        list(classify_frames(slow_runtime(), address))
    assert "falsch" not in repr(error.value)


@pytest.mark.parametrize("name", ["a.png", "a.mp4"])
def test_a_server_that_is_off(name: str) -> None:
    quick = LiveSettings(read_timeout_s=1)
    with pytest.raises(MexitError, match=r"http://127\.0\.0\.1:9/.*: Connection refused") as error:
        list(classify_frames(slow_runtime(), f"http://me:geheim@127.0.0.1:9/{name}", live=quick))
    assert "geheim" not in repr(error.value)


def test_a_text_is_no_video(web: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("a shopping list\n" * 100)
    with pytest.raises(Damaged, match="is no video"):
        list(classify_frames(slow_runtime(), f"{web}/a.mp4"))


def test_a_server_that_does_not_speak_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def answer() -> None:
            client, _ = server.accept()
            with client:
                client.recv(1000)
                client.sendall(b"no status line\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(MexitError, match=f"http://{address}/a.png cannot be fetched: BadStatusLine"):
            list(classify_frames(slow_runtime(), f"http://{address}/a.png"))
        thread.join()
