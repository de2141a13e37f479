"""An edge box: the built wheel with the extras cpu, serve and camera, in a clean environment without torch."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def box(tmp_path_factory) -> Path:
    """A clean environment's folder of programs."""
    folder = tmp_path_factory.mktemp("box")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("mexit-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    programs = folder / "venv" / "bin"
    install = [programs / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    subprocess.run([*install, f"{wheel}[cpu,serve,camera]"], check=True)
    return programs


def test_neither_torch_nor_onnx_is_there(box) -> None:
    for package in ("torch", "onnx", "matplotlib", "safetensors"):
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is not None)"
        assert subprocess.run([box / "python", "-c", code], check=False).returncode == 0, package


def test_serve_answers(box, digits_bundle, workspace, test_digits, tmp_path) -> None:
    from PIL import Image

    Image.fromarray(test_digits[0][0]).save(tmp_path / "digit.png")
    server = subprocess.Popen(
        [box / "mexit", "serve", digits_bundle, "--budget", "low", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split(" at ")[1].split()[0]
        content = (tmp_path / "digit.png").read_bytes()
        with urllib.request.urlopen(f"{url}/v1/classify", data=content, timeout=10) as reply:
            answer = json.loads(reply.read())
    finally:
        server.send_signal(signal.SIGTERM)
    assert server.wait(20) == 0
    run = [box / "mexit", "run", digits_bundle, tmp_path / "digit.png", "--json"]
    direct = json.loads(subprocess.run(run, check=True, capture_output=True).stdout)["predictions"][0]
    assert (direct["label"], direct["exit"], direct["macs"]) == (answer["label"], answer["exit"], answer["macs"])


def test_camera_answers_and_annotates(box, digits_bundle, workspace, test_digits, tmp_path) -> None:
    from PIL import Image

    for place in range(5):
        Image.fromarray(test_digits[0][place].repeat(8, 0).repeat(8, 1)).save(tmp_path / f"{place}.png")
    command = [box / "mexit", "camera", digits_bundle, "--source", str(tmp_path / "*.png"), "--json"]
    command += ["--out", tmp_path / "seen.mp4", "--jsonl", tmp_path / "seen.jsonl"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert report["frames"] == 5
    assert len((tmp_path / "seen.jsonl").read_text().splitlines()) == 5
    assert (tmp_path / "seen.mp4").stat().st_size > 1000


def test_training_there_says_what_to_install(box, tmp_path) -> None:
    done = subprocess.run([box / "mexit", "train"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "pip install 'mexit[train]'" in done.stderr
    assert "Traceback" not in done.stderr
