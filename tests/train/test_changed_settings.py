"""`mexit train --resume` applies settings that can change, stores them, and rejects the others by name."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused, typed
from safetensors.torch import load_file

from mexit.errors import UsageError
from mexit.flows.train import TrainOptions, train_model
from mexit.train import checkpoint
from mexit.train.changed_settings import change_settings, describe_change
from mexit.train.checkpoint import Position
from mexit.train.config import TrainSettings

QUICK = {"method": "clean", "epochs": 2, "batch": 300, "precision": "fp32", "lr": 0.02}
ONE = TrainOptions(threads=1)


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs. Read it only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        patch.setitem(sys.modules, "matplotlib", None)
        return train_model(settings=QUICK, out=Path("x").absolute(), options=ONE).run


@pytest.fixture
def run(trained: Path) -> Path:
    """That run as a test's own run `x`."""
    return Path(shutil.copytree(trained, "x"))


def at(epoch: int, step: int = 0, **fields: Any) -> Position:
    return Position(epoch, step, {}, None, 0, **fields)


def changed(
    given: dict[str, Any], stored: TrainSettings | None = None, position: Position | None = None
) -> TrainSettings:
    return change_settings(Path("x"), stored or TrainSettings(epochs=3), given, position or at(1, 2))


def test_a_finished_run_with_more_epochs_trains_on(run: Path) -> None:
    """It ends in the weights of a run of that length: the rate is constant until three fifths of the run."""
    first = load_file(run / checkpoint.WEIGHTS)
    result = train_model(settings={"epochs": 3}, out=run, resume=True, options=ONE)
    assert result.finished
    assert [record["epoch"] for record in result.records] == [1, 2, 3]
    assert result.settings["epochs"] == json.loads((run / "settings.json").read_bytes())["epochs"] == 3
    assert result.settings["changes"] == ({"epoch": 2, "step": 0, "before": {"epochs": 2}},)
    kept = load_file(run / "weights-epoch2-step0.safetensors")
    assert all(torch.equal(kept[name], first[name]) for name in first), "bundles of the old result still find it"
    assert any(not torch.equal(load_file(run / checkpoint.WEIGHTS)[name], first[name]) for name in first)


def test_a_stopped_run_with_more_epochs_and_another_rate_is_that_run_from_there_on(run: Path) -> None:
    lr, stops = {"decay_at": (), "lr": 0.02}, iter((False, True))
    train_model(settings=QUICK | lr, out=Path("y"), options=TrainOptions(threads=1, should_stop=lambda: next(stops)))
    result = train_model(settings={"lr": 0.01, "epochs": 3}, out=Path("y"), resume=True, options=ONE)
    assert [record["lr"] for record in result.records] == [0.01, 0.01, 0.01]
    assert checkpoint.load_settings(Path("y")).changes[0]["before"] == {"lr": 0.02, "epochs": 2}


def test_the_command_applies_and_reports_a_change(run: Path) -> None:
    done = typed("train", "--resume", "--out", run, "--epochs", "3", "--threads", "1", "--keep", "best")
    assert done.exit_code == 0
    assert "changed: --epochs 3 instead of 2, --keep best instead of last" in " ".join(done.stderr.split())
    assert (run / checkpoint.WEIGHTS).exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--method adversarial", "with its own --method (clean): leave it out, or begin another run with --out"),
        ("--eps 4/255 --seed 3", "its own --eps (0.1) and --seed (0): leave them out"),
        ("--data mnist", "its own --data (digits)"),
        ("--preset neo_kd", "its own --preset (demo)"),
        ("--set alpha=2", "its own --set (none)"),
        ("--batch 7 --epochs 3", "its own --batch (300)"),
        ("--lr 0.5", "has done 2 epochs in 0"),
        ("--epochs 1", "so --epochs would change nothing: add --epochs 3 or more"),
        ("--epochs 3 --minutes 1", "a run ends after --minutes or after --epochs"),
        ("--epochs 0", "--epochs must be at least 1, found 0"),
        ("--minutes 0", "--minutes must be above 0"),
    ],
)
def test_what_cannot_change_is_rejected_by_name(flags: str, words: str, run: Path) -> None:
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert words in refused("train", "--resume", "--out", run, *flags.split(), code=2)
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_own_settings_and_those_not_given_change_nothing() -> None:
    stored = TrainSettings(exit_weights=(1.0, 2.0, 1.0), options={"alpha": 3})
    given = {"epochs": 20, "exit_weights": [1.0, 2.0, 1.0], "options": {"alpha": 3}, "lr": None, "data": "digits"}
    assert changed(given, stored) is stored


def test_a_radius_is_shown_as_the_fraction_that_was_typed() -> None:
    with pytest.raises(UsageError, match=r"--eps \(8/255\) and --step \(0.01\)"):
        changed({"eps": 0.1, "step": 2 / 255}, TrainSettings(eps=8 / 255, step=0.01))


def test_the_end_can_move_from_epochs_to_the_clock_and_back() -> None:
    by_clock = changed({"minutes": 5.0})
    assert (by_clock.minutes, by_clock.changes[0]["before"]) == (5.0, {"minutes": 0.0})
    back = changed({"epochs": 20}, TrainSettings(minutes=5.0, steps_done=90), at(4, elapsed_s=300.0, steps_done=90))
    assert (back.minutes, back.epochs, back.steps_done) == (0.0, 20, 0)
    assert describe_change(back, TrainSettings(minutes=5.0)) == "--epochs 20 instead of --minutes 5"


def test_a_run_by_the_clock_needs_more_than_the_time_it_took() -> None:
    stored = TrainSettings(minutes=5.0)
    ended = at(4, elapsed_s=301.0, steps_done=90)
    for given in ({"minutes": 5.01}, {"lr": 1.0}):
        with pytest.raises(UsageError, match=r"has done 4 epochs in 5 minutes, so .*--minutes above 5,"):
            changed(given, stored, ended)
    assert changed({"minutes": 6.0}, stored, ended).minutes == 6.0
    assert changed({"lr": 1.0}, stored, at(2, elapsed_s=100.0)).lr == 1.0


def test_a_finished_run_by_the_clock_trains_on(tmp_path: Path) -> None:
    clock = QUICK | {"minutes": 0.002}
    del clock["epochs"]
    first = train_model(settings=clock, out=Path("x"), options=ONE)
    assert first.finished
    longer = checkpoint.load_position(Path("x")).elapsed_s / 60 + 0.005
    second = train_model(settings={"minutes": longer}, out=Path("x"), resume=True, options=ONE)
    assert second.finished
    assert second.settings["steps_done"] > first.settings["steps_done"] > 0
    third = train_model(settings={"epochs": len(second.records) + 1}, out=Path("x"), resume=True, options=ONE)
    assert (third.settings["minutes"], third.settings["steps_done"]) == (0.0, 0)
    assert len(third.records) == len(second.records) + 1
    assert len(third.settings["changes"]) == 2


def test_changes_add_up_and_old_runs_have_none() -> None:
    twice = changed({"lr": 0.5}, changed({"epochs": 9}), at(2))
    assert [entry["before"] for entry in twice.changes] == [{"epochs": 3}, {"lr": 0.03}]
    stored = json.loads(json.dumps(twice.to_json()))
    assert TrainSettings.from_json(stored, "") == twice
    del stored["changes"]
    assert TrainSettings.from_json(stored, "").changes == ()


def test_a_clean_run_does_not_become_robust(run: Path) -> None:
    assert "x trains on clean images, which --robust cannot change" in refused(
        "train", "--resume", "--out", run, "--robust", "8/255", code=2
    )
