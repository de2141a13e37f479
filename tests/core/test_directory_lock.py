"""One process at a time holds the lock of a directory; a killed process does not keep it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mexit.core.directory_lock import LOCK, directory_lock
from mexit.errors import MexitError, UsageError

HOLD = """
import sys, time
from pathlib import Path
from mexit.core.directory_lock import directory_lock
with directory_lock(Path(sys.argv[1]), "x is in use"):
    print("held", flush=True)
    time.sleep(60)
"""


def lock(folder: Path) -> None:
    """Lock the directory and free it."""
    with directory_lock(folder, "x is in use"):
        assert (folder / LOCK).exists()


@pytest.fixture
def other(tmp_path: Path):
    """Another process that holds the lock of the directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_held_lock_names_its_process_and_host(other: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"x is in use by process {other.pid} on .+: wait"):
        lock(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_killed_process_is_free(other: subprocess.Popen[str], tmp_path: Path, number: int) -> None:
    other.send_signal(number)
    other.wait()
    assert (tmp_path / LOCK).exists(), "the file is left behind"
    lock(tmp_path)
    assert not (tmp_path / LOCK).exists()


def test_the_lock_holds_within_one_process_too_and_is_freed_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with directory_lock(tmp_path, "x is in use"):
            with pytest.raises(UsageError, match=f"by process {os.getpid()} on"):
                lock(tmp_path)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    lock(tmp_path)


def test_a_lock_file_with_other_content_blocks_nothing(tmp_path: Path) -> None:
    for content in (b"", b"\xff", b"[1]"):
        (tmp_path / LOCK).write_bytes(content)
        lock(tmp_path)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(MexitError, match=f"could not lock {tmp_path}/gone: No such file"):
        lock(tmp_path / "gone")
