"""Every command and program of the guide docs/own-pictures.md runs, in its order, on a folder of pictures."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from command_line import MEXIT, quiet, typed
from PIL import Image

from mexit.data import digits

GUIDE = Path(__file__).parents[1] / "docs" / "own-pictures.md"
APART = ("mexit train", "mexit export")
START_S = 60
SHORTER = {"mexit train": ["--epochs", "6", "--threads", "1"]}  # than ten minutes


def guide_blocks() -> list[tuple[str, str]]:
    """Language and text of each block of the guide that runs."""
    return re.findall(r"```(sh|python)\n(.*?)```", GUIDE.read_text(), re.S)


def draw_pictures(folder: Path) -> Path:
    """Class folders of the digits, 16 pixels wide, and one more picture. Returns the latter."""
    data = digits.load()
    for i, (image, label) in enumerate(zip(data.images.at(range(len(data))), data.labels, strict=True)):
        path = folder / "pictures" / f"digit-{label}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((16, 16)).save(path)
    picture = folder / "picture.png"
    path.rename(picture)
    return picture


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=quiet(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_here(arguments: list[str]) -> str:
    """Run a command in this process, in the working directory."""
    done = typed(*arguments)
    assert done.exit_code == 0, f"{arguments}\n{done.output}"
    return str(done.stdout)


def start_server(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    """Start the server and wait until it answers, at most `START_S` seconds."""
    address = f"http://127.0.0.1:{arguments[arguments.index('--port') + 1]}/v2/health/ready"
    process = subprocess.Popen([*MEXIT, *arguments], cwd=folder, env=quiet())
    deadline = time.monotonic() + START_S
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise AssertionError("the server ended, or did not answer in time") from None
            time.sleep(0.1)
        else:
            return process


def post(line: str, folder: Path) -> str:
    """Send what the curl command of the guide sends."""
    _, option, file, address = shlex.split(line)
    assert option == "--data-binary"
    content = (folder / file.removeprefix("@")).read_bytes()
    with urllib.request.urlopen(address, content, timeout=60) as answer:
        return str(answer.read().decode())


@pytest.mark.slow
def test_the_guide_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, export, server and program have processes of their own."""
    draw_pictures(tmp_path)
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    server, said = None, {}
    try:
        for language, block in guide_blocks():
            if language == "python":
                said["python"] = run([sys.executable, "-c", block], tmp_path)
                continue
            for line in block.replace("8000", port).splitlines():
                command = " ".join(line.split()[:2])
                if command == "mexit serve":
                    server = start_server(shlex.split(line)[1:], tmp_path)
                elif line.startswith("curl"):
                    said["curl"] = post(line, tmp_path)
                elif command in APART:
                    said[command] = run([*MEXIT, *shlex.split(line)[1:], *SHORTER.get(command, [])], tmp_path)
                else:
                    said[command] = run_here(shlex.split(line)[1:])
    finally:
        if server is not None:
            server.terminate()
            server.wait(30)
    assert '"label": "digit-' in said["curl"]
    assert "digit-" in said["python"]
    assert set(said) >= {"mexit data", "mexit train", "mexit export", "mexit evaluate", "mexit calibrate", "mexit run"}
