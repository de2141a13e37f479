"""The processors and memory that control groups and affinity leave to this process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import program

from mexit.core.resource_limits import ResourceLimits, read_limits

# Control group files below /proc and /sys: their contents, and the limits that they set.
GROUPS = {
    "v2": ({"cgroup": "0::/a/b", "a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1.5, None),
    "v2 memory": ({"cgroup": "0::/a", "a/memory.max": "max", "memory.max": "1000000"}, None, 1000000),
    "v2 in a container": ({"cgroup": "0::/host/path", "cpu.max": "400000 100000"}, 4.0, None),
    "v1": (
        {"cgroup": "3:cpu,cpuacct:/x", "cpu,cpuacct/x/cpu.cfs_quota_us": "50000",
         "cpu,cpuacct/x/cpu.cfs_period_us": "100000"}, 0.5, None,
    ),
    "v1 without limit": (
        {"cgroup": "3:cpu:/\n4:memory:/y", "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
         "memory/y/memory.limit_in_bytes": "9223372036854771712"}, None, None,
    ),
    "v1 memory": ({"cgroup": "4:memory:/y", "memory/y/memory.limit_in_bytes": "5000"}, None, 5000),
    "both": (
        {"cgroup": "3:cpu:/\n0::/z", "cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000",
         "unified/z/cpu.max": "200000 100000"}, 2.0, None,
    ),
    "nonsense": ({"cgroup": "what\n0::/\n", "cpu.max": "many", "memory.max": "x"}, None, None),
    "nothing": ({}, None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_limits_of_control_groups(name: str, tmp_path: Path) -> None:
    files, quota, memory = GROUPS[name]
    for path, content in files.items():
        full = tmp_path / ("proc/self/cgroup" if path == "cgroup" else f"sys/fs/cgroup/{path}")
        full.parent.mkdir(parents=True, exist_ok=True)
        full.write_text(content + "\n")
    limits = read_limits(tmp_path)
    assert (limits.quota, limits.memory_bytes) == (quota, memory)


def test_threads_follow_the_smaller_of_affinity_and_quota() -> None:
    assert [ResourceLimits(8, quota, None).threads for quota in (None, 0.2, 1.5, 2.0, 64.0)] == [8, 1, 2, 2, 8]


# A child process on eight processors, in a control group that bounds its time.
IN_GROUP = """
import os, pathlib
files = FILES
read_text = pathlib.Path.read_text
os.sched_getaffinity = lambda _: set(range(8))
pathlib.Path.read_text = lambda path, *given, **more: files.get(str(path)) or read_text(path, *given, **more)
"""
ONE_PROCESSOR = {"/proc/self/cgroup": "0::/", "/sys/fs/cgroup/cpu.max": "100000 100000"}
PART_OF_THREE = {"/proc/self/cgroup": "0::/box", "/sys/fs/cgroup/box/cpu.max": "250000 100000"}
OF_THE_PARENT = {
    "/proc/self/cgroup": "0::/pod/box",
    "/sys/fs/cgroup/pod/box/cpu.max": "max 100000",
    "/sys/fs/cgroup/pod/cpu.max": "200000 100000",
}
QUOTA = IN_GROUP.replace("FILES", repr(ONE_PROCESSOR))
USERS = """
import sys
import torch
from mexit.core.resource_limits import read_limits
from mexit.serving.limits import Limits
from mexit.serving.server_state import ServerState
from mexit.train.precision import set_threads
set_threads(None)
server = ServerState(Limits())
print(read_limits().threads, torch.get_num_threads(), server.workers)
server.close()
"""


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        (ONE_PROCESSOR, "1"),
        pytest.param(PART_OF_THREE, "3", marks=pytest.mark.slow),
        pytest.param(OF_THE_PARENT, "2", marks=pytest.mark.slow),
    ],
)
def test_training_and_server_follow_the_quota(digits_bundle: Path, files: dict[str, str], threads: str) -> None:
    command = [sys.executable, "-c", IN_GROUP.replace("FILES", repr(files)) + USERS, str(digits_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == [threads] * 3, done.stderr


@pytest.mark.slow
def test_doctor_names_the_quota() -> None:
    done = program("doctor", before=QUOTA)
    assert "8 by affinity, the time of 1 by control group" in " ".join(done.stdout.split())
