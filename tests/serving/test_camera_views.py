"""Cameras beside the server: their routes and their metrics."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from servers import Server, refused, start, wait_until

from mexit import Bundle
from mexit.serving import openapi

jsonschema = pytest.importorskip("jsonschema", reason="needs the extra dev")
pytest.importorskip("av", reason="needs the extra camera")
PICTURES = 300


@pytest.fixture(scope="module")
def cameras_file(
    mixed_bundle: Path,
    test_digits: tuple[NDArray[np.uint8], NDArray[np.int64]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Two cameras; the tokens of the rate limiter let them read about 20 pictures a second."""
    folder = tmp_path_factory.mktemp("cameras")
    (folder / "digits").mkdir()
    for number in range(PICTURES):
        picture = np.repeat(np.repeat(test_digits[0][number], 100, axis=0), 100, axis=1)
        Image.fromarray(picture).save(folder / "digits" / f"{number}.png")
    full = Bundle.open(mixed_bundle).manifest.cumulative_macs[-1]
    path = folder / "cameras.toml"
    path.write_text(
        f"rate = '{20 * full}/s'\nburst = {2 * full}\nbudget = 'full'\n"
        f"[[camera]]\nname = 'front door'\nsource = '{folder}/digits'\n"
        f"[[camera]]\nname = 'gate'\nsource = '{folder}/digits/*.png'\n"
    )
    return path


@pytest.fixture(scope="module")
def watching(mixed_bundle: Path, cameras_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the cameras, each of which has an answer."""
    with start(mixed_bundle, tmp_path_factory.mktemp("server"), cameras=str(cameras_file)) as server:
        wait_until(lambda: all(camera["answer"] is not None for camera in server.json("GET", "/v1/cameras")[1]))
        yield server


def test_the_state_of_cameras(watching: Server) -> None:
    status, cameras = watching.json("GET", "/v1/cameras")
    assert status == 200
    assert [camera["name"] for camera in cameras] == ["front door", "gate"]
    for camera in cameras:
        assert camera["state"] in ("live", "ended")
        assert camera["answer"]["camera"] == camera["name"]
        assert 0 < camera["counters"]["answered"] <= PICTURES
    description = openapi.description()
    schema = {**description["components"]["schemas"]["Cameras"], "components": description["components"]}
    jsonschema.validate(cameras, schema)
    assert watching.json("GET", "/v1/stats")[1]["cameras"] == 2


def test_a_picture(watching: Server) -> None:
    status, headers, content = watching.ask("GET", "/v1/cameras/front%20door/picture.jpg")
    assert (status, headers["content-type"], headers["cache-control"]) == (200, "image/jpeg", "no-store")
    with Image.open(io.BytesIO(content)) as picture:
        assert (picture.format, picture.size) == ("JPEG", (267, 267))


def test_a_stream_of_pictures(watching: Server) -> None:
    connection = watching.connect()
    try:
        connection.request("GET", "/v1/cameras/gate/stream.mjpg")
        response = connection.getresponse()
        assert response.getheader("content-type") == "multipart/x-mixed-replace; boundary=frame"
        parts = []
        for _ in range(3):
            assert response.readline() == b"--frame\r\n"
            assert response.readline() == b"Content-Type: image/jpeg\r\n"
            length = int(response.readline().partition(b":")[2])
            assert response.readline() == b"\r\n"
            parts.append(response.read(length))
            assert response.readline() == b"\r\n"
    finally:
        connection.close()
    assert all(part.startswith(b"\xff\xd8") for part in parts)
    assert len(set(parts)) > 1
    head = watching.ask("HEAD", "/v1/cameras/gate/stream.mjpg")
    assert (head[0], head[2]) == (200, b"")


def test_series_of_cameras(watching: Server) -> None:
    answered = watching.series("mexit_camera_frames_total", camera="gate", outcome="answered")
    assert answered > 0
    assert watching.series("mexit_camera_exits_total", camera="gate") >= answered
    assert watching.series("mexit_camera_state", camera="gate") == 1
    assert watching.series("mexit_camera_age_seconds", camera="gate") > 0
    assert watching.series("mexit_camera_macs_total") > 0


@pytest.mark.parametrize("file", ["picture.jpg", "stream.mjpg"])
def test_an_unknown_camera(watching: Server, file: str) -> None:
    status, value = watching.json("GET", f"/v1/cameras/yard/{file}")
    assert status == 404
    assert value == {"error": "unknown camera 'yard': this server has front door, gate"}


def test_a_server_without_cameras(server: Server) -> None:
    for path in ("/v1/cameras", "/v1/cameras/gate/picture.jpg", "/v1/cameras/gate/stream.mjpg"):
        status, value = server.json("GET", path)
        assert (status, value) == (404, {"error": "this server has no cameras: mexit serve --cameras FILE"})
    assert server.json("GET", "/v1/stats")[1]["cameras"] == 0


def test_a_signal_ends_the_cameras(mixed_bundle: Path, cameras_file: Path, tmp_path: Path) -> None:
    content = cameras_file.read_text().replace("name = 'gate'", f"name = 'gate'\njsonl = '{tmp_path}/gate.jsonl'")
    (tmp_path / "a.toml").write_text(content)
    with start(mixed_bundle, tmp_path, cameras=str(tmp_path / "a.toml")) as server:
        wait_until(lambda: server.series("mexit_camera_frames_total", camera="gate", outcome="answered") > 3)
        connection = server.connect()
        connection.request("GET", "/v1/cameras/gate/stream.mjpg")  # ends too
        connection.getresponse()
        assert server.stop() == 0, server.errors
        connection.close()
    lines = (tmp_path / "gate.jsonl").read_text().splitlines()
    assert all(json.loads(line)["camera"] == "gate" for line in lines)
    assert 3 < len(lines) < 2 * PICTURES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("votes = 0", ":4: camera 'a': votes: found 0; expected a whole number of at least 1"),
        ("region = [0, 0, 1]", ":4: camera 'a': region: found [0, 0, 1]; expected [x, y, width, height]"),
    ],
)
def test_a_faulty_file_of_cameras(mixed_bundle: Path, tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "cameras.toml"
    path.write_text(f"[[camera]]\nname = 'a'\nsource = 'rtsp://127.0.0.1/x'\n{change}\n")
    assert message in refused(mixed_bundle, tmp_path, cameras=str(path))


def test_settings_of_the_server_are_not_those_of_cameras(mixed_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "cameras.toml"
    path.write_text("threads = 2\n[[camera]]\nname = 'a'\nsource = 'rtsp://127.0.0.1/x'\n")
    assert "threads: the cameras run on the engine of the server" in refused(mixed_bundle, tmp_path, cameras=str(path))
    path.write_text(path.read_text().removeprefix("threads = 2\n"))
    assert "which needs --workers 0" in refused(mixed_bundle, tmp_path, cameras=str(path), workers=2)
