"""Eight RTSP cameras under one rate limit, five of them in trouble: the other three are never old."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mexit import Runtime
from mexit.camera.cameras_file import CamerasFile, read_cameras_file
from mexit.camera.fleet import Fleet
from mexit.flows.fleet import running_fleet

SYSTEM_PYTHON = "/usr/bin/python3"
PROGRAM = Path(__file__).parent / "rtsp_server.py"
BINDINGS = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"
CAMERAS, OTHERS = 8, (5, 6, 7)
OLDEST_S = 2.0
pytestmark = pytest.mark.long


class RtspServer:
    """The server of one camera, which can be started again in another way on the same port."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        self.address = f"rtsp://127.0.0.1:{self.port}/camera"
        self._process: subprocess.Popen[str] | None = None

    def start(self, width: int = 320, height: int = 240, fps: int = 10, kind: str = "good") -> None:
        self.kill()
        command = [SYSTEM_PYTHON, str(PROGRAM), *map(str, (self.port, width, height, fps, kind))]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


@pytest.fixture
def servers() -> Iterator[list[RtspServer]]:
    found = (
        Path(SYSTEM_PYTHON).exists()
        and not subprocess.run([SYSTEM_PYTHON, "-c", BINDINGS], capture_output=True, check=False).returncode
    )
    if not found:
        pytest.skip(
            "needs an RTSP server: apt-get install gir1.2-gst-rtsp-server-1.0 python3-gi gstreamer1.0-plugins-ugly"
        )
    started = [RtspServer() for _ in range(CAMERAS)]
    try:
        for server in started:
            server.start()
        yield started
    finally:
        for server in started:
            server.kill()


def cameras_file(folder: Path, servers: list[RtspServer], full: int) -> CamerasFile:
    """A file with all cameras; the rate is less than what they send."""
    lines = [f"rate = '{60 * full}/s'", "budget = 'full'"]
    for i, server in enumerate(servers):
        lines += [f"[[camera]]\nname = 'camera {i}'\nsource = '{server.address}'\nreuse = false\nfrozen_s = 3"]
    path = folder / "cameras.toml"
    path.write_text("\n".join(lines))
    return read_cameras_file(path)


def watch(fleet: Fleet, seconds: float) -> tuple[float, float]:
    """The greatest time since the last answered frame of the cameras without trouble, and age of an answer, seconds."""
    greatest_s, oldest_s, end_s = 0.0, 0.0, time.monotonic() + seconds
    while time.monotonic() < end_s:
        for camera in [fleet.status()[i] for i in OTHERS]:
            assert camera.age_s is not None
            assert camera.prediction is not None
            greatest_s, oldest_s = max(greatest_s, camera.age_s), max(oldest_s, camera.prediction.age_ms / 1e3)
        time.sleep(0.02)
    return greatest_s, oldest_s


def wait_for(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def test_cameras_in_trouble_delay_no_other(
    servers: list[RtspServer], digits_bundle: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    runtime, messages = Runtime.open(digits_bundle, "full"), list[str]()
    file = cameras_file(tmp_path, servers, runtime.bundle.manifest.cumulative_macs[-1])
    with running_fleet(runtime, file, on_message=messages.append) as (fleet, _):
        wait_for(lambda: all(camera.state == "live" for camera in fleet.status()))
        ages = {"all is well": watch(fleet, 5)}
        servers[0].kill()
        ages["killed"] = watch(fleet, 5)
        servers[1].signal(signal.SIGSTOP)
        ages["stopped"] = watch(fleet, 5)
        servers[2].start(width=1280, height=720)
        ages["resized"] = watch(fleet, 5)
        servers[3].start(kind="corrupt")
        ages["corrupted"] = watch(fleet, 8)
        servers[4].start(fps=100)
        ages["ten times as fast"] = watch(fleet, 8)
        servers[3].start(kind="frozen")
        ages["frozen"] = watch(fleet, 8)
        wait_for(lambda: [camera.state for camera in fleet.status()[:2]] == ["lost", "lost"])
        wait_for(lambda: fleet.status()[3].state == "frozen")
        servers[0].start()
        servers[1].signal(signal.SIGCONT)
        wait_for(lambda: [camera.state for camera in fleet.status()[:3]] == ["live", "live", "live"])
        ages["back"] = watch(fleet, 5)
    record_property("ages", ages)
    assert max(max(pair) for pair in ages.values()) < OLDEST_S, ages
    for camera in fleet.status():
        counters = camera.counters
        assert camera.error == ""
        assert counters.arrived == counters.answered + counters.dropped + counters.undecodable, camera.name
        assert counters.answered > 50, camera.name
    assert fleet.status()[4].counters.dropped > 100
