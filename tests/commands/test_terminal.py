"""A closed pipe or a full disk behind standard output gives one line and an exit code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BUNDLE = Path(__file__).parents[1] / "golden" / "0.1.0" / "bundles" / "demo"
FULL = Path("/dev/full")
COMMANDS = {
    "inspect": ["inspect", str(BUNDLE)],
    "inspect --json": ["inspect", str(BUNDLE), "--json"],
    "camera": ["camera", str(BUNDLE), "--source", "PICTURES"],
    "camera --json": ["camera", str(BUNDLE), "--source", "PICTURES", "--json"],
    "run": ["run", str(BUNDLE), "PICTURES/1.png"],
    "version": ["--version"],
    "help": ["serve", "--help"],
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(40):
        Image.fromarray(np.full((8, 8), 6 * i, np.uint8)).save(folder / f"{i}.png")
    return folder


def mexit(arguments: Sequence[str], pictures: Path, output: int) -> tuple[int, list[str]]:
    """Run the command with this standard output; return the exit code and the lines on standard error."""
    words = [word.replace("PICTURES", str(pictures)) for word in arguments]
    command = [sys.executable, "-m", "mexit", *words]
    done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=120)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_full_disk(arguments: list[str], pictures: Path) -> None:
    with FULL.open("wb") as full:
        code, lines = mexit(arguments, pictures, full.fileno())
    assert (code, len(lines)) == (1, 1), lines
    assert re.fullmatch(r"error: .* cannot be written: No space left on device", lines[0])


@pytest.mark.parametrize("arguments", [COMMANDS[name] for name in COMMANDS if name != "help"])
def test_a_closed_pipe(arguments: list[str], pictures: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with closing(os.fdopen(writing, "wb")) as pipe:
        code, lines = mexit(arguments, pictures, pipe.fileno())
    assert (code, lines) == (1, ["error: standard output cannot be written: the program that reads it has ended"])


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_disk_for_results(pictures: Path) -> None:
    code, lines = mexit([*COMMANDS["camera"], "--jsonl", str(FULL)], pictures, subprocess.DEVNULL)
    assert (code, lines) == (1, ["error: could not write /dev/full: No space left on device"])


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_messages_that_cannot_be_written_do_not_stop_the_work() -> None:
    command = [sys.executable, "-m", "mexit", "inspect", str(BUNDLE.parent / "none")]
    with FULL.open("wb") as full:
        assert subprocess.run(command, stderr=full, timeout=60).returncode == 2


def test_a_server_goes_on() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "mexit", "serve", str(BUNDLE), "--port", "0"]
    with subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE, text=True) as process:
        os.close(writing)
        assert process.stderr is not None
        url = re.search(r"serving at (http://\S+)$", process.stderr.readline().strip())
        assert url is not None
        with urllib.request.urlopen(f"{url[1]}/v2/health/live") as response:
            assert response.status == 200
        process.terminate()
        assert process.wait(20) == 0
