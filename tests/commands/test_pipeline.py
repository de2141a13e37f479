"""The commands in the order of the pipeline, without arguments; the first ones each in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import MEXIT, refused, typed
from PIL import Image

from mexit.core.bundle import Bundle

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The working directory of the commands below, which run one after the other."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in this process have the directory and the environment of those in a process of their own."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("MEXIT_CACHE", str(home / "cache"))


def printed(*arguments: object) -> dict[str, Any]:
    """The JSON object that a command prints in this process."""
    done = typed(*arguments, "--json")
    assert done.exit_code == 0, done.output
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def mexit(home: Path, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, with the environment of the fixtures."""
    done = subprocess.run([*MEXIT, *arguments], cwd=home, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == expect, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def test_1_train(home) -> None:
    done = mexit(home, "train", "--epochs", "3", "--threads", "1")
    assert "mexit export" in done.stdout
    assert (home / "runs/digits-neo-kd/weights.safetensors").exists()
    assert (home / "runs/digits-neo-kd/curves.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (home / "runs/digits-neo-kd/log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3]


def test_2_export_with_trt_writes_a_complete_bundle_with_and_without_tensorrt(home) -> None:
    """Without TensorRT, the exit code is 4 and the message names the command for the device."""
    has_tensorrt = importlib.util.find_spec("tensorrt_rtx") is not None
    done = mexit(home, "export", "--trt", "--exits", "all", expect=0 if has_tensorrt else 4)
    assert ("built, not run" in done.stdout) == has_tensorrt
    assert ("mexit export bundles/digits-neo-kd --trt" in done.stderr) != has_tensorrt
    assert "using runs/digits-neo-kd" in done.stderr
    bundle = Bundle.open(home / "bundles/digits-neo-kd")
    entry = bundle.policies().entry("ort", "fp32", "fp32")
    assert set(entry.named) == {"low", "medium", "high", "full"}
    assert entry.frontier[10].attacked is not None


def test_3_calibrate() -> None:
    done = typed("calibrate", "--budget", "night=30%", "--json")
    result = json.loads(done.stdout)
    assert result["bundle"] == "bundles/digits-neo-kd"
    assert "night" in result["entry"]["named"]
    assert "using bundles/digits-neo-kd" in done.stderr


def test_4_serve(home) -> None:
    image = home / "seven.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30), np.uint8)).save(image)
    server = subprocess.Popen(
        [*MEXIT, "serve", "--budget", "low", "--port", "0"], cwd=home, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert "serving bundles/digits-neo-kd at http://127.0.0.1:" in line
        url = line.split(" at ")[1].split()[0]
        with urllib.request.urlopen(f"{url}/v1/classify", data=image.read_bytes(), timeout=10) as reply:
            answer = json.loads(reply.read())
        assert answer["budget"] == "low"
    finally:
        server.send_signal(signal.SIGTERM)
    assert server.wait(20) == 0
    direct = json.loads(mexit(home, "run", "seven.png", "--json").stdout)["predictions"][0]
    assert {**direct, "latency_ms": 0, "image": 0} == {**answer, "latency_ms": 0, "image": 0}


def test_5_other_commands_print_json(home) -> None:
    evaluation = printed("evaluate", "--samples", 60, "--steps", 5)
    assert set(evaluation) >= {"exits", "budgets", "transfer", "settings", "flags"}
    assert set(evaluation["exits"][0]) == {"exit", "clean", "average", "max-average", "worst"}
    assert evaluation["exits"][0]["clean"].keys() == {"value", "n", "stderr"}
    assert len(evaluation["transfer"]) == 3
    inspection = printed("inspect")
    assert inspection["bundle"] == json.loads((home / "bundles/digits-neo-kd/bundle.json").read_text())
    bench = printed("bench", "--repeats", 20, "--batch", 1)
    assert {row["path"] for row in bench["rows"]} == {"full", "exit 1", "low", "medium", "high", "night"}
    assert all(0 < row["p50_us"] <= row["p95_us"] and row["mean_us"] > 0 for row in bench["rows"])
    run = printed("evaluate", "runs/digits-neo-kd", "--samples", 60, "--steps", 5)
    assert run["budgets"] == {}
    for deployed, trained in zip(evaluation["exits"], run["exits"], strict=True):
        assert deployed == trained, "the bundle answers as the network it was exported from"


def test_6_tables() -> None:
    for words, line in (
        ("accuracy per exit", "evaluate --samples 60 --steps 2"),
        ("calibrated for ort fp32", "inspect"),
        ("every budget against the static network", "bench --repeats 20 --batch 1"),
        ("seven.png", "run bundles/digits-neo-kd seven.png"),
    ):
        assert words in typed(*line.split()).stdout


def test_7_existing_runs_and_bundles_are_not_overwritten() -> None:
    assert "--replace" in refused("export", code=2)
    assert "--resume" in refused("train", "--out", "runs/digits-neo-kd", code=2)
    assert typed("export", "--replace", "--no-calibrate", "--exits", "all").exit_code == 0
    assert "mexit calibrate" in refused("run", "seven.png", code=3)
    assert "no thresholds" not in typed("run", "seven.png", "--budget", "full").stderr
    assert "mexit export --replace" in typed("train", "--resume", "--epochs", "4", "--threads", "1").stdout


@pytest.mark.long
def test_demo_keeps_its_promises(home) -> None:
    """Accuracy and cost of the demo's own settings on the test split."""
    report = json.loads(mexit(home, "demo", "--json").stdout)
    clean = [row["clean"] for row in report["exits"]]
    attacked = [row["attacked"] for row in report["exits"]]
    assert np.mean(clean) >= 0.98
    assert min(clean) >= 0.97
    assert np.mean(attacked) >= 0.80
    for row in report["budgets"].values():
        assert 0.90 <= row["mean_macs"] / row["budget_macs"] <= 1.05
        assert row["saved"] == pytest.approx(1 - row["mean_macs"] / report["budgets"]["full"]["mean_macs"])
        assert sum(row["exits"]) == report["n"] == 449
    two_errors = 2 * np.sqrt(clean[0] * (1 - clean[0]) / report["n"])
    assert report["budgets"]["low"]["accuracy"] >= clean[0] - two_errors
    samples = sorted((home / "runs/demo/samples").glob("*.png"))
    answers = json.loads(mexit(home, "run", *map(str, samples), "--json").stdout)["predictions"]
    assert sum(answer["label"] == Path(answer["image"]).stem[-1] for answer in answers) >= len(samples) - 1
