"""What `mexit serve` prints when it is ready: commands that work."""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import urllib.request
from pathlib import Path

from command_line import MEXIT, quiet


def test_the_command_for_a_folder_of_models_names_one(digits_bundle: Path, sample_png: bytes, tmp_path: Path) -> None:
    shutil.copytree(digits_bundle, tmp_path / "models" / "night-cam")
    line = [*MEXIT, "serve", str(tmp_path / "models"), "--workers", "0", "--port", "0"]
    environment = {**quiet(), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(6)]
        classify = next(shlex.split(one) for one in lines if "--data-binary" in one)
        with urllib.request.urlopen(classify[-1], data=sample_png, timeout=20) as answer:
            assert answer.status == 200
        assert classify[-1].endswith("/v1/classify?model=night-cam")
        assert [one.split("/", 3)[-1] for one in lines[4:]] == ["v2/repository/index\n", "metrics\n"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
