"""Runs never share a directory, a run in training is locked, and a run that fails at once leaves nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import MEXIT, quiet, refused
from PIL import Image

from mexit.core.directory_lock import directory_lock
from mexit.errors import MexitError, UsageError
from mexit.flows.train import TrainOptions, train_model
from mexit.train import checkpoint
from mexit.train.run_directory import has_progress, new_run

QUICK = {"method": "clean", "epochs": 1, "batch": 943, "precision": "fp32"}
FLAGS = ("--method", "clean", "--epochs", "1", "--batch", "943", "--threads", "1")


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def two_classes(root: Path) -> str:
    """A folder data set with two classes of 40 pictures."""
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for number in range(40):
            Image.new("L", (28, 28), 100 * label + number).save(root / name / f"{number}.png")
    return f"folder:{root}"


@pytest.mark.long
def test_trainings_started_together_have_a_directory_each() -> None:
    command = [*MEXIT, "train", *FLAGS, "--seed"]
    processes = [subprocess.Popen([*command, str(seed)], env=quiet(), stdout=subprocess.DEVNULL) for seed in (1, 2, 3)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    runs = sorted(path.parent for path in Path("runs").glob("*/settings.json"))
    assert [run.name for run in runs] == ["digits-clean", "digits-clean-2", "digits-clean-3"]
    assert sorted(json.loads((run / "settings.json").read_bytes())["seed"] for run in runs) == [1, 2, 3]
    assert all((run / checkpoint.WEIGHTS).exists() for run in runs)


def test_a_free_name_is_taken_once_even_while_its_directory_is_empty() -> None:
    with new_run(None, "x") as first, new_run(None, "x") as second:
        assert (first, second) == (Path("runs/x"), Path("runs/x-2"))


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_in_training_is_refused_with_its_process(resume: bool) -> None:
    train_model(settings=QUICK, out=Path("x"), options=TrainOptions(threads=1, should_stop=lambda: True))
    before = {path: path.read_bytes() for path in Path("x").iterdir()}
    with directory_lock(Path("x"), ""):
        said = refused("train", *FLAGS, "--out", "x", *(["--resume"] if resume else []), code=2)
    assert f"run x is being trained by process {os.getpid()} on" in said
    assert {path: path.read_bytes() for path in Path("x").iterdir()} == before


def test_a_run_that_trains_refuses_a_second_process_from_within() -> None:
    """The lock is held while steps run, not only while the directory is made."""
    said = []

    def another() -> bool:
        said.append(refused("train", "--resume", "--out", "x", code=2))
        return True

    train_model(settings=QUICK, out=Path("x"), options=TrainOptions(threads=1, should_stop=another))
    assert "is being trained by process" in said[0]


@pytest.mark.parametrize("out", [None, "named", "existing"])
def test_settings_rejected_at_the_first_step_leave_the_name_free(out: str | None, tmp_path: Path) -> None:
    """`dlr` needs three classes, which shows when it is computed."""
    data = two_classes(tmp_path / "pets")
    if out == "existing":
        Path(out).mkdir()
        Path(out, "notes.txt").write_text("mine")
    settings = {"method": "adversarial", "steps": 1, "epochs": 1, "loss": "dlr", "model": "small-cnn"}
    run = Path(out) if out else None
    with pytest.raises(MexitError, match="dlr"):
        train_model(data, settings=settings, out=run, options=TrainOptions(threads=1))
    left = [str(path) for path in Path().rglob("*") if "pets" not in path.parts and path.is_file()]
    assert left == (["existing/notes.txt"] if out == "existing" else [])
    result = train_model(data, settings={**settings, "loss": "margin"}, out=run, options=TrainOptions(threads=1))
    assert result.run == (run or Path("runs/pets-adversarial"))


def test_the_newest_run_is_again_the_one_before_a_failed_one(tmp_path: Path) -> None:
    train_model(settings=QUICK, options=TrainOptions(threads=1))
    with pytest.raises(MexitError, match="the loss became nan in epoch 1, step 2: lower --lr") as caught:
        train_model(settings=QUICK | {"lr": 1e30, "batch": 300}, options=TrainOptions(threads=1))
    assert "checkpoint" not in str(caught.value), "there is none"
    assert Path("runs/latest").read_text() == "runs/digits-clean\n"
    assert sorted(path.name for path in Path("runs").iterdir()) == ["digits-clean", "latest"]


def test_a_refused_resume_does_not_make_a_run_the_newest() -> None:
    for name in ("first", "second"):
        train_model(settings=QUICK, out=Path(name), options=TrainOptions(threads=1))
    assert "its own --batch (943)" in refused("train", "--resume", "--out", "first", "--batch", "7", code=2)
    assert Path("runs/latest").read_text() == "second\n"
    train_model(settings={"epochs": 2}, out=Path("first"), resume=True, options=TrainOptions(threads=1))
    assert Path("runs/latest").read_text() == "first\n"


def test_a_run_with_a_checkpoint_survives_an_error() -> None:
    def fail() -> bool:
        if (Path("x") / checkpoint.CHECKPOINT).exists():
            raise MexitError("failed in the second epoch")
        return False

    with pytest.raises(MexitError, match="second epoch"):
        train_model(settings=QUICK | {"epochs": 2}, out=Path("x"), options=TrainOptions(threads=1, should_stop=fail))
    assert has_progress(Path("x"))
    assert train_model(resume=True, options=TrainOptions(threads=1)).finished


def test_ctrl_c_before_the_first_checkpoint_leaves_nothing() -> None:
    def interrupt() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_model(settings=QUICK, options=TrainOptions(threads=1, should_stop=interrupt))
    assert list(Path("runs").rglob("*")) == []


def test_a_run_killed_before_its_first_checkpoint_starts_from_its_settings() -> None:
    script = (
        "from mexit.flows.train import TrainOptions, train_model; import os\n"
        f"train_model(settings={QUICK}, options=TrainOptions(threads=1, should_stop=lambda: os.kill(os.getpid(), 9)))"
    )
    assert subprocess.run([sys.executable, "-c", script], env=quiet(), check=False).returncode == -9
    run = Path("runs/digits-clean")
    assert not (run / checkpoint.CHECKPOINT).exists()
    assert "exists already: continue it with --resume" in refused("train", *FLAGS, "--out", run, code=2)
    assert f"run {run} has no checkpoint yet: mexit train --resume --out {run}" in refused("export", run, code=2)
    assert train_model(resume=True, options=TrainOptions(threads=1)).finished


def test_a_file_at_the_place_of_the_run_is_named() -> None:
    Path("x").write_text("a file")
    assert "could not create x: File exists" in refused("train", *FLAGS, "--out", "x", code=1)
    assert "x is a file, the directory of a run is expected" in refused("train", "--resume", "--out", "x", code=2)
    Path("runs").write_text("a file")
    with pytest.raises(MexitError, match="could not create runs/digits-clean: Not a directory"):
        train_model(settings=QUICK, options=TrainOptions(threads=1))


def test_two_names_of_one_directory_are_one_run(tmp_path: Path) -> None:
    with new_run(Path("x"), "") as run:
        Path("link").symlink_to(run.absolute())
        another = new_run(Path("link"), "")
        with pytest.raises(UsageError, match="is being trained"):
            another.__enter__()
