"""A run stopped by Ctrl-C, SIGTERM or `kill -9` and resumed ends with the weights of an uninterrupted run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import MEXIT, quiet, refused, typed
from PIL import Image
from safetensors.numpy import load_file

from mexit.flows.train import TrainOptions, train_model
from mexit.train import checkpoint
from mexit.train.checkpoint import read_log

pytestmark = pytest.mark.slow

TIMEOUT_S = 100
EPOCHS = 5
FLAGS = ["--epochs", str(EPOCHS), "--batch", "128", "--steps", "1", "--step", "0.05", "--threads", "1"]
GIVEN = {"epochs": EPOCHS, "batch": 128, "steps": 1, "step": 0.05}


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@dataclasses.dataclass(frozen=True)
class Stop:
    """The exit code, standard error and number of logged epochs of a `mexit train` stopped by a signal."""

    code: int
    stderr: str
    epochs: int


def started(folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [*MEXIT, "train", "--out", "runs/x", *flags]
    return subprocess.Popen(command, cwd=folder, env=quiet(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for a condition; fail if the process ends or the time is up."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert process.poll() is None, f"training ended by itself: {process.communicate()}"
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stop(folder: Path, number: int, *flags: str) -> Stop:
    """Train, and send the signal after the next logged epoch."""
    log = folder / "runs/x" / checkpoint.LOG
    before = lines(log)
    process = started(folder, *flags)
    try:
        wait_until(lambda: lines(log) > before, process)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
    return Stop(process.returncode, " ".join(stderr.split()), lines(log))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("interrupted")


@pytest.fixture(scope="module")
def stops(folder: Path) -> dict[str, Stop]:
    """The same run, stopped by Ctrl-C, resumed, stopped by SIGTERM, resumed, and killed; not resumed since."""
    return {
        "Ctrl-C": stop(folder, signal.SIGINT, *FLAGS),
        "SIGTERM": stop(folder, signal.SIGTERM, "--resume", "--threads", "1"),
        "kill -9": stop(folder, signal.SIGKILL, "--resume", "--threads", "1"),
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "runs" / "x"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.parents[1])
        patch.setitem(sys.modules, "matplotlib", None)
        train_model(settings=GIVEN, out=run, options=TrainOptions(threads=1))
    return run


def same_bits(one: Path, other: Path) -> bool:
    first, second = load_file(one / checkpoint.WEIGHTS), load_file(other / checkpoint.WEIGHTS)
    return first.keys() == second.keys() and all(first[name].tobytes() == second[name].tobytes() for name in first)


@pytest.mark.parametrize(("name", "code"), [("Ctrl-C", 130), ("SIGTERM", 143)])
def test_a_signal_sets_the_exit_code_and_prints_the_command_to_resume(
    name: str, code: int, stops: dict[str, Stop]
) -> None:
    result = stops[name]
    assert result.code == code
    assert "stopping after this step, with a checkpoint" in result.stderr
    assert "error: stopped; continue with: mexit train --resume --out runs/x" in result.stderr
    assert "Traceback" not in result.stderr


def test_each_stop_came_before_the_end(stops: dict[str, Stop]) -> None:
    assert stops["kill -9"].code == -signal.SIGKILL
    epochs = [result.epochs for result in stops.values()]
    assert 0 < epochs[0] < epochs[1] < epochs[2] < EPOCHS


def test_a_resumed_run_equals_an_uninterrupted_run_to_the_bit(
    stops: dict[str, Stop], folder: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(folder / "runs/x", tmp_path / "runs/x"))
    assert not (run / checkpoint.WEIGHTS).exists()
    halfway, final = load_file(run / checkpoint.CHECKPOINT), load_file(uninterrupted / checkpoint.WEIGHTS)
    assert all((halfway[f"kept.{name}"] != final[name]).any() for name in final if name.endswith("weight"))
    assert typed("train", "--resume", "--out", run, "--threads", "1").exit_code == 0
    assert same_bits(run, uninterrupted)
    assert read_log(run) == read_log(uninterrupted)


def test_an_unfinished_run_is_not_evaluated(stops: dict[str, Stop], folder: Path) -> None:
    message = refused("evaluate", folder / "runs/x", code=2)
    assert f"run {folder}/runs/x is not finished: mexit train --resume --out {folder}/runs/x" in message
    assert "mexit export takes its checkpoint" in message


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_pictures_are_read_stops_at_once_and_leaves_nothing(
    number: int, code: int, tmp_path: Path
) -> None:
    """The pictures take much longer to read than the test may last."""
    for label, name in enumerate("ab"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("L", (4000, 4000), label).save(tmp_path / f"{name}.png")
        for k in range(2000):
            os.link(tmp_path / f"{name}.png", tmp_path / "pictures" / name / f"{k}.png")
    process = started(tmp_path, "--data", "folder:pictures")
    assert process.stderr is not None
    try:
        assert "2 classes: a, b" in process.stderr.readline()
        process.send_signal(number)
        _, stderr = process.communicate(timeout=TIMEOUT_S / 2)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code
    assert stderr.endswith("error: stopped\n")
    assert not list((tmp_path / "runs").iterdir())


LOADED = """
import sys
from importlib.machinery import ExtensionFileLoader as Extension
from mexit.core.progress import StopSignal

enter, defer, before = StopSignal.__enter__, StopSignal.defer, set()
StopSignal.__enter__ = lambda stop: before.update(sys.modules) or enter(stop)

def print_new(stop):
    loaders = {name: getattr(module, "__loader__", None) for name, module in sys.modules.items()}
    new = [name for name, loader in loaders.items() if isinstance(loader, Extension) and name not in before]
    print(new, file=sys.stderr)
    defer(stop)

StopSignal.defer = print_new
sys.argv = ["mexit", "train", "--method", "clean", "--epochs", "1", "--threads", "1", "--out", "runs/x"]
from mexit.cli import main
main()
"""


def test_no_extension_module_is_loaded_while_a_signal_raises(tmp_path: Path) -> None:
    """Cython's modules call Python code as they are loaded, and go on after a `KeyboardInterrupt` in it."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED], cwd=tmp_path, env=quiet(), capture_output=True, text=True, check=True
    )
    assert "[]" in done.stderr.splitlines(), done.stderr


@pytest.mark.parametrize("steps_before", [3, 8, 40])
def test_a_run_stopped_after_any_step_is_resumed_to_the_bit(
    steps_before: int, uninterrupted: Path, tmp_path: Path
) -> None:
    """The run has 5 epochs of 8 steps: stop within one, at the last step of one, and at the last step."""
    asked = iter(range(1, 1_000))
    result = train_model(
        settings=GIVEN,
        out=tmp_path / "x",
        options=TrainOptions(threads=1, should_stop=lambda: next(asked) == steps_before),
    )
    assert not result.finished
    assert train_model(out=tmp_path / "x", resume=True, options=TrainOptions(threads=1)).finished
    assert same_bits(tmp_path / "x", uninterrupted)
    assert read_log(tmp_path / "x") == read_log(uninterrupted)


@pytest.fixture
def stopped(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of the finished run without its resulting weights, as after a kill just before they are written."""
    run = Path(shutil.copytree(uninterrupted, tmp_path / "runs" / "x"))
    (run / checkpoint.WEIGHTS).unlink()
    return run


def test_a_run_killed_before_its_result_was_written_only_writes_the_result(stopped: Path, uninterrupted: Path) -> None:
    options = TrainOptions(threads=1, should_stop=lambda: pytest.fail("trained another step"))
    assert train_model(out=stopped, resume=True, options=options).finished
    assert same_bits(stopped, uninterrupted)


def test_a_log_line_written_after_the_checkpoint_is_dropped_on_resuming(stopped: Path, uninterrupted: Path) -> None:
    with (stopped / checkpoint.LOG).open("ab") as file:
        file.write(b'{"epoch": 5, "half a li')
    train_model(out=stopped, resume=True, options=TrainOptions(threads=1))
    assert read_log(stopped) == read_log(uninterrupted)


@pytest.mark.parametrize("damage", ["gone", "shorter"])
def test_a_run_with_a_damaged_log_can_be_finished(damage: str, stopped: Path, uninterrupted: Path) -> None:
    log = stopped / checkpoint.LOG
    log.write_bytes(log.read_bytes().split(b"\n")[0] + b"\n") if damage == "shorter" else log.unlink()
    train_model(out=stopped, resume=True, options=TrainOptions(threads=1))
    assert same_bits(stopped, uninterrupted)
    assert len(read_log(stopped)) == (1 if damage == "shorter" else 0)


CHECKPOINTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "is not readable: its header claims 0 bytes"),
    "cut short": (lambda good: good[: len(good) // 2], "is not readable"),
    "header of terabytes": (lambda good: b"\xff" * 7 + b"\x00" + good[8:], "is not readable: its header claims"),
    "no json": (lambda good: good[:8] + b"x" + good[9:], "is not readable"),
    "pickle": (lambda good: b"\x80\x04\x95" + good[3:], "is not readable"),
    "position not a number": (
        lambda good: good.replace(b'\\"epoch\\": 5', b'\\"epoch\\":{}'),
        "has no valid position",
    ),
    "position missing": (lambda good: good.replace(b'"progress"', b'"prog-ess"'), "has no valid position"),
    "tensor renamed": (
        lambda good: good.replace(b'"model.stages.0', b'"model.stages.9', 1),
        "holds another network",
    ),
}


@pytest.mark.parametrize(("damage", "words"), CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_a_damaged_checkpoint_is_named(damage: Callable[[bytes], bytes], words: str, stopped: Path) -> None:
    path = stopped / checkpoint.CHECKPOINT
    path.write_bytes(damage(path.read_bytes()))
    message = refused("train", "--resume", "--out", stopped, code=5)
    assert str(path) in message
    assert words in message


def test_a_run_is_not_resumed_on_other_data(stopped: Path) -> None:
    with np.load(stopped / checkpoint.SPLITS) as file:
        arrays = dict(file)
    about = json.loads(arrays["about"].tobytes()) | {"data_sha256": "0" * 64}
    np.savez(stopped / checkpoint.SPLITS, **arrays | {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)})
    assert "it was changed, or is another" in refused("train", "--resume", "--out", stopped, code=5)


def test_a_run_without_settings_can_be_started_again(stopped: Path) -> None:
    for name in (checkpoint.SETTINGS, checkpoint.CHECKPOINT, checkpoint.LOG):
        (stopped / name).unlink()
    assert typed("train", "--out", stopped, "--method", "clean", "--epochs", "1", "--threads", "1").exit_code == 0
