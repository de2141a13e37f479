"""A full disk or a closed pipe ends every command with at most one line, and never with a traceback."""

from __future__ import annotations

import os
import re
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import MEXIT, quiet
from PIL import Image

pytestmark = pytest.mark.slow
COMMANDS = {
    "inspect, json": "inspect {bundle} --json",
    "help": "train --help",
    "run": "run {bundle} x.png",
    "camera": "camera {bundle} --source x.png",
    "calibrate": "calibrate {bundle} --attack none",
}


def started(line: str, bundle: Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a command beside the picture x.png."""
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("x.png")
    command = [*MEXIT, *line.format(bundle=bundle).split()]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": quiet(), "timeout": 120, **options}
    return subprocess.run(command, check=False, **options)


def errors(stderr: bytes) -> list[str]:
    text = stderr.decode()
    assert "Traceback" not in text
    assert "Exception ignored" not in text
    return [line for line in text.splitlines() if "rror:" in line]


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_full_standard_output_is_one_line(line: str, bundle_copy: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = started(line, bundle_copy, stdout=full)
    assert errors(done.stderr) == ["error: could not write the output: No space left on device"]
    assert done.returncode == 1


@pytest.mark.parametrize("line", ["inspect {bundle} --json", "run {bundle} x.png"])
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_closed_standard_output_is_no_error(line: str, unbuffered: str, digits_bundle: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = started(line, digits_bundle, stdout=writing, env=quiet() | {"PYTHONUNBUFFERED": unbuffered})
    os.close(writing)
    assert errors(done.stderr) == []
    assert done.returncode == 0


@pytest.mark.parametrize(("line", "code"), [("run {bundle} x.png", 0), ("run {bundle} y.png", 2)])
def test_a_full_standard_error_hides_only_its_lines(line: str, code: int, digits_bundle: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = started(line, digits_bundle, stderr=full)
    assert done.returncode == code


def no_file(size: int) -> Callable[[], None]:
    """For a program that is about to start: no file it writes can grow beyond `size` bytes."""
    import resource

    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("camera {bundle} --source x.png --jsonl /dev/full", "could not write /dev/full: No space left on device"),
        ("camera {bundle} --source x.png --jsonl small.jsonl", "could not write small.jsonl: File too large"),
        ("camera {bundle} --source x.png --jsonl x.png/y.jsonl", "could not write x.png/y.jsonl: "),
    ],
)  # fmt: skip
def test_json_lines_on_a_full_disk_are_one_line(line: str, words: str, digits_bundle: Path) -> None:
    limit = no_file(20) if "small" in line else None
    done = started(line, digits_bundle, preexec_fn=limit)
    (said,) = errors(done.stderr)
    assert words in said
    assert (done.returncode, done.stdout) == (1, b"")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train --method clean --epochs 1 --out x --threads 1", "could not write x/splits.npz: File too large"),
        ("evaluate {bundle} --samples 20 --steps 1", "evaluation-pgd.json: File too large"),
        ("export {run} --out bundles/full", "could not write"),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(line: str, words: str, workspace: Path, bundle_copy: Path) -> None:
    places = line.replace("{run}", str(workspace / "runs/digits")).replace(
        "{bundle}", str(workspace / "bundles/digits")
    )
    cwd = workspace if line.startswith("evaluate") else Path.cwd()
    done = started(places, bundle_copy, preexec_fn=no_file(700), cwd=cwd)
    (said,) = errors(done.stderr)
    assert words in said
    assert done.returncode == 1
    assert not Path("x").exists()
    assert not Path("bundles/full").exists()


@pytest.mark.parametrize("target", ["/dev/full", "a closed pipe"])
def test_a_server_goes_on(target: str, digits_bundle: Path) -> None:
    """Its address is then a message."""
    if target == "a closed pipe":
        reading, output = os.pipe()
        os.close(reading)
    else:
        output = os.open(target, os.O_WRONLY)
    command = [*MEXIT, "serve", str(digits_bundle), "--port", "0"]
    with subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, env=quiet(), text=True) as process:
        os.close(output)
        assert process.stderr is not None
        url = re.search(r"serving at (http://\S+)$", process.stderr.readline().strip())
        assert url is not None
        with urllib.request.urlopen(f"{url[1]}/v2/health/live") as response:
            assert response.status == 200
        process.terminate()
        assert process.wait(20) == 0
