"""The first start of a server on a device: it measures and selects budgets in time; later starts read the result."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from command_line import MEXIT, quiet

pytestmark = pytest.mark.slow
CHOSEN = re.compile(r"measured on this device: static [\d,]+ us; .*")


def start(bundle: Path, cache: Path, log: Path) -> subprocess.Popen[str]:
    """`mexit serve --budget low --cost time` with a device cache of its own."""
    command = [*MEXIT, "serve", str(bundle), "--budget", "low", "--cost", "time", "--port", "0"]
    environment = {**quiet(), "MEXIT_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as errors:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)


def said(process: subprocess.Popen[str], log: Path) -> list[str]:
    """What was measured and chosen, line by line, of a server that listens by now; it is stopped."""
    assert process.stdout is not None
    before: list[str] = []
    try:
        while not any("http://" in line for line in before):
            line = process.stdout.readline()
            assert line, f"it did not start: {before} {log.read_text()}"
            before.append(line)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    return CHOSEN.findall(" ".join(before) + log.read_text())


@pytest.fixture
def moved(mixed_bundle, tmp_path) -> Path:
    """The calibrated bundle, copied to another place."""
    return Path(shutil.copytree(mixed_bundle, tmp_path / "elsewhere" / "digits"))


def test_a_moved_bundle_is_measured_once_and_later_starts_read_it(moved, tmp_path) -> None:
    cache = tmp_path / "cache"
    before = {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()}
    assert len(said(start(moved, cache, tmp_path / "1.log"), tmp_path / "1.log")) == 1
    (stored,) = cache.rglob("policies-*.json")
    content = stored.read_bytes()
    assert said(start(moved, cache, tmp_path / "2.log"), tmp_path / "2.log") == []
    assert stored.read_bytes() == content
    assert {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()} == before


def test_of_two_first_starts_at_once_one_measures(moved, tmp_path) -> None:
    logs = [tmp_path / f"{number}.log" for number in (1, 2)]
    servers = [start(moved, tmp_path / "cache", log) for log in logs]
    try:
        lines = [said(server, log) for server, log in zip(servers, logs, strict=True)]
    finally:
        for server in servers:  # the second one where the first one failed
            server.kill()
    assert sorted(map(len, lines)) == [0, 1]


@pytest.mark.long
def test_with_a_cache_that_cannot_be_written_every_start_measures(moved, tmp_path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o500)
    if os.access(cache, os.W_OK):  # root may write everywhere
        cache.rmdir()
        cache.touch()
    for log in (tmp_path / "1.log", tmp_path / "2.log"):
        assert len(said(start(moved, cache, log), log)) == 1
