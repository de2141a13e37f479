"""Eight RTSP cameras under one rate limit, five of them in trouble: the other three are never old."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rtsp_cameras import RtspServer, cameras_file, running_servers, wait_for

from mexit import Runtime
from mexit.camera.fleet import Fleet
from mexit.flows.fleet import running_fleet

CAMERAS, OTHERS = 8, (5, 6, 7)
OLDEST_S = 2.0
pytestmark = pytest.mark.long


@pytest.fixture
def servers() -> Iterator[list[RtspServer]]:
    with running_servers(CAMERAS) as started:
        yield started


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


def test_cameras_in_trouble_delay_no_other(
    servers: list[RtspServer], digits_bundle: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    runtime, messages = Runtime.open(digits_bundle, "full"), list[str]()
    file = cameras_file(tmp_path, servers, 60 * runtime.bundle.manifest.cumulative_macs[-1])  # less than they send
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
