"""Several cameras with one engine: they share it, and one that fails delays no other."""

from __future__ import annotations

import itertools
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from camera_media import grey_frames, write_images, write_video
from camera_senders import RtspCamera, TcpCamera, nal_units, transport_stream

from mexit import Runtime
from mexit.camera.camera_thread import Camera
from mexit.camera.cameras_file import CameraSettings, CamerasFile, cameras_of_sources
from mexit.camera.events import CameraEvent
from mexit.camera.fleet import CameraStatus, Fleet, share_rate
from mexit.camera.frame import RGB
from mexit.camera.live_stream import LiveSettings
from mexit.camera.outputs.output import Output
from mexit.camera.parse_source import parse_source
from mexit.camera.prediction import CameraPrediction
from mexit.camera.steady import SteadySettings
from mexit.camera.triggers import TriggerSettings
from mexit.errors import Damaged, MexitError, UsageError
from mexit.flows.camera import run_cameras
from mexit.runtime.token_buckets import RateLimit

FPS = 50
QUICK = LiveSettings(open_timeout_s=5, read_timeout_s=1.5, first_delay_s=0.05, longest_delay_s=0.1)


@pytest.fixture(scope="module")
def runtime(digits_bundle: Path) -> Runtime:
    return Runtime.open(digits_bundle, "low")


@pytest.fixture(scope="module")
def chunks() -> list[bytes]:
    return transport_stream(grey_frames(400, (48, 64)), FPS)


class Recorder:
    """An output that keeps what it gets."""

    name, lost = "recorder", 0

    def __init__(self) -> None:
        self.answers: list[CameraPrediction] = []
        self.events: list[CameraEvent] = []
        self.closed = 0

    def write(self, frame: RGB, prediction: CameraPrediction) -> None:
        self.answers.append(prediction)

    def event(self, event: CameraEvent) -> None:
        self.events.append(event)

    def close(self) -> Path | None:
        self.closed += 1
        return None


def live(name: str, address: str, *outputs: Output, **settings: object) -> Camera:
    """A camera that is opened again quickly; every frame of it runs."""
    steady = SteadySettings(trigger=TriggerSettings(reuse=False))
    return Camera(name, parse_source(address), steady=steady, live=QUICK, open_outputs=lambda **_: outputs, **settings)  # type: ignore[arg-type]


def wait_for(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def state(fleet: Fleet) -> dict[str, str]:
    return {camera.name: camera.state for camera in fleet.status()}


def assert_counted(status: CameraStatus) -> None:
    """Every frame was answered, dropped or undecodable."""
    counters = status.counters
    assert counters.arrived == counters.answered + counters.dropped + counters.undecodable, counters


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_files_are_read_side_by_side(digits_bundle: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", [f"{i}.png" for i in range(7)])
    write_video(tmp_path / "clip.mp4", grey_frames(20), [i / 25 for i in range(20)])
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    sources = [str(tmp_path / name) for name in ("pictures", "clip.mp4", "broken.mp4")]
    cameras = [
        CameraSettings(name=name, source=source, jsonl=tmp_path / f"{name}.jsonl")
        for name, source in zip(("pictures", "clip", "broken"), sources, strict=True)
    ]
    seen: list[CameraPrediction] = []
    report = run_cameras(digits_bundle, CamerasFile(tuple(cameras)), on_result=seen.append)
    assert [camera.frames for camera in report.cameras] == [7, 20, 0]
    assert [camera.dropped for camera in report.cameras] == [0, 0, 0]
    pictures, clip, broken = report.cameras
    assert pictures.error is clip.error is None
    assert broken.error is not None
    assert "is no video" in broken.error
    assert pictures.outputs == (tmp_path / "pictures.jsonl",)
    for camera, count in (("pictures", 7), ("clip", 20)):
        lines = [json.loads(line) for line in (tmp_path / f"{camera}.jsonl").read_text().splitlines()]
        answers = [line for line in lines if "frame_index" in line]
        assert [(line["camera"], line["frame_index"]) for line in answers] == [(camera, i) for i in range(count)]
        assert [one.frame_index for one in seen if one.camera == camera] == list(range(count))


def test_the_answers_are_those_of_one_camera(digits_bundle: Path, tmp_path: Path, runtime: Runtime) -> None:
    write_video(tmp_path / "clip.mp4", grey_frames(30), [i / 25 for i in range(30)])
    alone = [prediction for _, prediction in runtime.camera(str(tmp_path / "clip.mp4"))]
    seen: list[CameraPrediction] = []
    settings = cameras_of_sources([str(tmp_path / "clip.mp4")] * 3)
    run_cameras(digits_bundle, CamerasFile(settings), on_result=seen.append)
    for camera in settings:
        answers = [one for one in seen if one.camera == camera.name]
        assert [(a.label, a.exit, a.macs) for a in answers] == [(b.label, b.exit, b.macs) for b in alone]
        assert [a.confidence for a in answers] == pytest.approx([b.confidence for b in alone], abs=1e-5)


def test_a_camera_that_is_off_delays_no_other(runtime: Runtime, chunks: list[bytes]) -> None:
    recorder, messages = Recorder(), list[str]()
    with TcpCamera(chunks, FPS) as sender:
        cameras = [live("off", f"rtsp://me:geheim@127.0.0.1:{unused_port()}/x"), live("on", sender.address, recorder)]
        with Fleet(runtime, cameras, on_message=messages.append) as fleet:
            wait_for(lambda: len(recorder.answers) >= 40 and len(messages) >= 6)
            assert state(fleet) == {"off": "lost", "on": "live"}
    assert all("no connection yet" in message for message in messages)
    assert "geheim" not in str(messages)
    off, on = fleet.status()
    assert (off.state, on.state, off.error, on.error) == ("ended", "ended", "", "")
    assert (off.counters.arrived, off.prediction, off.picture) == (0, None, None)
    assert_counted(on)
    assert recorder.closed == 1


def test_a_lost_camera_comes_back(runtime: Runtime, chunks: list[bytes]) -> None:
    recorder = Recorder()
    with (
        TcpCamera(chunks, FPS, lives=[30, 400]) as sender,
        Fleet(runtime, [live("door", sender.address, recorder)], on_message=lambda _: None) as fleet,
    ):
        wait_for(lambda: "camera-back" in [event.kind for event in recorder.events])
        wait_for(lambda: fleet.status()[0].counters.reconnects == 1)
    [door] = fleet.status()
    assert_counted(door)
    assert [event.kind for event in recorder.events if event.kind.startswith("camera-")][:2] == [
        "camera-lost",
        "camera-back",
    ]


@pytest.mark.parametrize("scheme", ["tcp", "rtsp", "http"])
def test_a_stop_does_not_wait_for_a_silent_server(runtime: Runtime, scheme: str) -> None:
    """The server accepts the connection and says nothing; the time-outs are longer than the test may take."""
    patient = LiveSettings(open_timeout_s=1000, read_timeout_s=1000)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}://127.0.0.1:{server.getsockname()[1]}/live"
        with Fleet(runtime, [Camera("a", parse_source(address), live=patient)]) as fleet:
            connection, _ = server.accept()
        connection.close()
    assert fleet.status()[0].counters.arrived == 0


def test_the_clock_of_the_system_changes(
    runtime: Runtime, chunks: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It jumps by a day with every look at it."""
    clock = (1.7e9 + 86_400 * (-1) ** number for number in itertools.count())
    monkeypatch.setattr(time, "time", lambda: next(clock))
    recorder = Recorder()
    with TcpCamera(chunks, FPS) as sender, Fleet(runtime, [live("on", sender.address, recorder)]) as fleet:
        wait_for(lambda: len(recorder.answers) > 20)
        assert state(fleet) == {"on": "live"}
    assert all(0 <= answer.age_ms < 3_600_000 for answer in recorder.answers)
    assert [answer.captured_s for answer in recorder.answers] == sorted(
        answer.captured_s for answer in recorder.answers
    )
    assert {event.kind for event in recorder.events} <= {"label-changed"}
    assert all(0 <= event.seconds < 3600 for event in recorder.events)


def test_a_frozen_picture_is_an_event(runtime: Runtime) -> None:
    frames = [*grey_frames(20, (48, 64)), *grey_frames(1, (48, 64)) * 200, *grey_frames(150, (48, 64))]
    recorder = Recorder()
    with (
        TcpCamera(transport_stream(frames, FPS), FPS) as sender,
        Fleet(runtime, [live("hall", sender.address, recorder, frozen_s=1.0)]) as fleet,
    ):
        wait_for(lambda: state(fleet) == {"hall": "frozen"})
        wait_for(lambda: "camera-back" in [event.kind for event in recorder.events])
    kinds = [event.kind for event in recorder.events if event.kind.startswith("camera-")]
    assert kinds[:2] == ["camera-frozen", "camera-back"]


def status_of_a_picture(runtime: Runtime, folder: Path, size: tuple[int, int]) -> CameraStatus:
    """The status of a camera that answered one picture of `size` (H, W)."""
    write_images(folder / "a", ["1.png"], size=size)
    with Fleet(runtime, [Camera("a", parse_source(str(folder / "a")))]) as fleet:
        fleet.wait()
    [status] = fleet.status()
    return status


def test_the_status_has_a_small_picture(runtime: Runtime, tmp_path: Path) -> None:
    status = status_of_a_picture(runtime, tmp_path, (600, 1000))
    assert status.picture is not None
    assert status.picture.shape == (150, 250, 3)
    value = json.loads(json.dumps(status.to_json()))
    assert (value["name"], value["state"], value["error"]) == ("a", "ended", None)
    assert value["counters"]["answered"] == sum(value["exits"].values()) == 1
    assert value["answer"]["camera"] == "a"
    assert value["age_s"] > 0


def test_the_small_picture_of_a_very_tall_one(runtime: Runtime, tmp_path: Path) -> None:
    """JPEG ends at 65,535 rows."""
    status = status_of_a_picture(runtime, tmp_path, (66_000, 4))
    assert status.picture is not None
    assert status.picture.shape == (1270, 1, 3)


def test_a_wrong_password_ends_one_camera(runtime: Runtime, chunks: list[bytes]) -> None:
    units = nal_units(grey_frames(60), FPS)
    recorder = Recorder()
    with RtspCamera(units, FPS, "admin:right") as locked, TcpCamera(chunks, FPS) as sender:
        cameras = [
            live("locked", f"rtsp://admin:geheim@127.0.0.1:{locked.port}/live"),
            live("on", sender.address, recorder),
        ]
        with Fleet(runtime, cameras, on_message=lambda _: None) as fleet:
            wait_for(lambda: state(fleet)["locked"] == "ended" and len(recorder.answers) > 10)
            assert state(fleet)["on"] == "live"
        assert locked.refused == 2
    assert "check the user and the password" in fleet.status()[0].error
    assert "geheim" not in fleet.status()[0].error


class FullDisk(Recorder):
    """An output that cannot write its third answer."""

    def write(self, frame: RGB, prediction: CameraPrediction) -> None:
        if len(self.answers) == 2:
            raise MexitError("could not write it: No space left on device")
        super().write(frame, prediction)


def test_an_output_that_fails_ends_its_camera_alone(runtime: Runtime, chunks: list[bytes]) -> None:
    full, recorder = FullDisk(), Recorder()
    with TcpCamera(chunks, FPS) as one, TcpCamera(chunks, FPS) as two:
        cameras = [live("full", one.address, full), live("on", two.address, recorder)]
        with Fleet(runtime, cameras, on_message=lambda _: None) as fleet:
            wait_for(lambda: state(fleet) == {"full": "ended", "on": "live"} and len(recorder.answers) > 10)
    assert [camera.error for camera in fleet.status()] == ["could not write it: No space left on device", ""]
    assert [camera.to_json()["state"] for camera in fleet.status()] == ["ended", "ended"]
    assert (len(full.answers), full.closed) == (2, 1)


class NoEvents(Recorder):
    """An output that cannot write events."""

    def event(self, event: CameraEvent) -> None:
        raise MexitError(f"could not write {event.kind}")


def test_an_event_that_cannot_be_written_ends_its_camera_alone(runtime: Runtime, chunks: list[bytes]) -> None:
    recorder = Recorder()
    with TcpCamera(chunks, FPS) as sender:
        off = live("off", f"tcp://127.0.0.1:{unused_port()}", NoEvents())
        with Fleet(runtime, [off, live("on", sender.address, recorder)], on_message=lambda _: None) as fleet:
            wait_for(lambda: state(fleet) == {"off": "ended", "on": "live"})
            count = len(recorder.answers)
            wait_for(lambda: len(recorder.answers) > count)
    assert [camera.error for camera in fleet.status()] == ["could not write camera-lost", ""]


def test_an_unexpected_error_ends_all(runtime: Runtime, chunks: list[bytes]) -> None:
    class Broken(Recorder):
        def write(self, frame: RGB, prediction: CameraPrediction) -> None:
            raise ZeroDivisionError("a bug")

    recorder = Recorder()
    with TcpCamera(chunks, FPS) as one, TcpCamera(chunks, FPS) as two:
        cameras = [live("broken", one.address, Broken()), live("on", two.address, recorder)]
        with pytest.raises(ZeroDivisionError, match="a bug"), Fleet(runtime, cameras) as fleet:
            fleet.wait()
    assert recorder.closed == 1
    assert state(fleet) == {"broken": "ended", "on": "ended"}


def test_one_rate_bounds_all(runtime: Runtime, tmp_path: Path) -> None:
    """Frames of files wait for tokens, and the MACs of all cameras keep to one rate."""
    write_images(tmp_path / "a", [f"{i}.png" for i in range(8)])
    cameras = [Camera(str(i), parse_source(str(tmp_path / "a")), {"budget": "full"}) for i in range(3)]
    full = runtime.bundle.manifest.cumulative_macs[-1]
    share_rate(runtime, RateLimit(10 * full, 2 * full), [camera.name for camera in cameras])
    try:
        start_s = time.monotonic()
        with Fleet(runtime, cameras) as fleet:
            fleet.wait()
        seconds = time.monotonic() - start_s
    finally:
        share_rate(runtime, None, [])
    statuses = fleet.status()
    assert [status.counters.answered for status in statuses] == [8, 8, 8]
    assert sum(status.stats.macs for status in statuses) <= 2 * full + 10 * full * seconds


def test_a_stop_ends_frames_that_wait_for_tokens(runtime: Runtime, tmp_path: Path) -> None:
    write_images(tmp_path / "a", [f"{i}.png" for i in range(8)])
    full = runtime.bundle.manifest.cumulative_macs[-1]
    share_rate(runtime, RateLimit(1, full), ["a"])  # the second picture would wait for hours
    try:
        with Fleet(runtime, [Camera("a", parse_source(str(tmp_path / "a")), {"budget": "full"})]) as fleet:
            wait_for(lambda: fleet.status()[0].counters.answered >= 1)
            fleet.stop()
            fleet.wait()
    finally:
        share_rate(runtime, None, [])
    [status] = fleet.status()
    assert status.state == "ended"
    assert_counted(status)


def test_names_are_distinct(runtime: Runtime, tmp_path: Path) -> None:
    write_images(tmp_path / "a", ["1.png"])
    with pytest.raises(UsageError, match="cameras need distinct names, found a, a"):
        Fleet(runtime, [Camera("a", parse_source(str(tmp_path / "a")))] * 2)


def test_without_keep_trying_an_error_is_raised(digits_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(Damaged, match="is no video"):
        run_cameras(digits_bundle, CamerasFile(cameras_of_sources([str(tmp_path / "a.mp4")])), keep_trying=False)
