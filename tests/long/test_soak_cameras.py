"""An hour with four RTSP cameras, two of which fail and return: flat memory, and answers that are never old."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rtsp_cameras import cameras_file, running_servers, wait_for

from mexit import Runtime
from mexit.flows.fleet import running_fleet

MINUTES = 60.0
SETTLED = 0.25  # share of the time after which memory has to stay flat
GROWTH_MB = 20.0
OLDEST_S = 2.0
TROUBLE_S = 20.0
pytestmark = pytest.mark.long


def resident_mb() -> float:
    """Memory of this process."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_an_hour_of_cameras(
    digits_bundle: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    runtime, messages = Runtime.open(digits_bundle, "full"), list[str]()
    memory: list[float] = []
    oldest_s, next_s, turn = 0.0, time.monotonic(), 0
    with running_servers(4) as servers:
        file = cameras_file(tmp_path, servers, 40 * runtime.bundle.manifest.cumulative_macs[-1])
        with running_fleet(runtime, file, on_message=messages.append) as (fleet, _):
            wait_for(lambda: all(camera.state == "live" for camera in fleet.status()))
            end_s = time.monotonic() + 60 * MINUTES
            while time.monotonic() < end_s:
                ages = [camera.age_s for camera in fleet.status()[2:]]
                oldest_s = max(oldest_s, *(age for age in ages if age is not None))
                memory.append(resident_mb())
                if time.monotonic() > next_s:
                    failing = servers[turn // 2 % 2]
                    failing.kill() if turn % 2 == 0 else failing.start()
                    next_s, turn = time.monotonic() + TROUBLE_S, turn + 1
                time.sleep(0.1)
    settled = np.array(memory[round(SETTLED * len(memory)) :])
    early_mb, late_mb = (float(np.median(part)) for part in np.array_split(settled, 3)[::2])
    reconnects = [camera.counters.reconnects for camera in fleet.status()]
    answered = [camera.counters.answered for camera in fleet.status()]
    report = {"oldest_s": oldest_s, "early_mb": early_mb, "late_mb": late_mb, "answered": answered}
    for name, value in {**report, "reconnects": reconnects}.items():
        record_property(name, value)
    assert oldest_s < OLDEST_S
    assert late_mb - early_mb < GROWTH_MB
    assert min(reconnects[:2]) >= turn // 4 - 1
    for camera in fleet.status():
        counters = camera.counters
        assert camera.error == ""
        assert counters.arrived == counters.answered + counters.dropped + counters.undecodable
