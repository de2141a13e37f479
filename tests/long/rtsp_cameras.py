"""RTSP cameras of the system's GStreamer, each in a process of its own."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from mexit.camera.cameras_file import CamerasFile, read_cameras_file

SYSTEM_PYTHON = "/usr/bin/python3"
PROGRAM = Path(__file__).parent / "rtsp_server.py"
BINDINGS = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"
PACKAGES = "gir1.2-gst-rtsp-server-1.0 python3-gi gstreamer1.0-plugins-ugly gstreamer1.0-plugins-bad"


class RtspServer:
    """The server of one camera, which can be started again in another way on the same port."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        self.address = f"rtsp://127.0.0.1:{self.port}/camera"
        self._process: subprocess.Popen[str] | None = None

    def start(self, width: int = 320, height: int = 240, fps: int = 10, kind: str = "good") -> None:
        """Start the camera; `kind` as in `rtsp_server.py`."""
        self.kill()
        command = [SYSTEM_PYTHON, str(PROGRAM), *map(str, (self.port, width, height, fps, kind))]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """Switch the camera off."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


@contextmanager
def running_servers(count: int) -> Iterator[list[RtspServer]]:
    """Running cameras; the test is skipped where the system has no RTSP server."""
    if (
        not Path(SYSTEM_PYTHON).exists()
        or subprocess.run([SYSTEM_PYTHON, "-c", BINDINGS], capture_output=True).returncode
    ):
        pytest.skip(f"needs an RTSP server: apt-get install {PACKAGES}")
    servers = [RtspServer() for _ in range(count)]
    try:
        for server in servers:
            server.start()
        yield servers
    finally:
        for server in servers:
            server.kill()


def cameras_file(folder: Path, servers: Sequence[RtspServer], rate: int) -> CamerasFile:
    """A file with all cameras, in which every frame runs through the whole network; `rate` in MACs per second."""
    lines = [f"rate = '{rate}/s'", "budget = 'full'"]
    for i, server in enumerate(servers):
        lines += [f"[[camera]]\nname = 'camera {i}'\nsource = '{server.address}'\nreuse = false\nfrozen_s = 3"]
    path = folder / "cameras.toml"
    path.write_text("\n".join(lines))
    return read_cameras_file(path)


def wait_for(condition: Callable[[], bool], within_s: float = 90.0) -> None:
    """Wait for a condition."""
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)
