"""Runs that start from a frozen network are ordinary runs: complete or absent, resumable, exported and calibrated."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import refused, typed
from numpy.typing import NDArray
from safetensors.torch import load_file

from mexit import Runtime
from mexit.errors import BadInput
from mexit.flows.export import export_bundle
from mexit.flows.train import TrainOptions, TrainResult, train_model
from mexit.train import checkpoint

GIVEN: dict[str, Any] = {"model": "digits-cnn", "freeze": True}
TUNED: dict[str, Any] = {"model": "digits-cnn", "finetune": 2, "batch": 300, "precision": "fp32", "lr": 1e-4}
FROZEN_BATCHES = -(-943 // 32) + -(-81 // 32)  # of the training and of the selection split of digits
EXITS = 3


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def train(given: dict[str, Any], resume: bool = False, should_stop: Callable[[], bool] = lambda: False) -> TrainResult:
    return train_model(
        settings=given, out=Path("x"), resume=resume, options=TrainOptions(threads=1, should_stop=should_stop)
    )


def weights(name: str = checkpoint.WEIGHTS) -> dict[str, torch.Tensor]:
    return load_file(Path("x") / name)


def test_heads_alone_make_a_finished_run_that_is_exported_and_calibrated(
    test_digits: tuple[NDArray[np.uint8], NDArray[np.int64]],
) -> None:
    result = train(GIVEN)
    assert result.finished
    assert result.settings["exit_weights"][-1] == 1.0
    assert len(result.settings["exit_weights"]) == EXITS
    (record,) = result.records
    assert record["epoch"] == 0
    assert min(record["selection"]["clean"]) > 0.8
    model, settings, _ = checkpoint.load_model(Path("x"))
    assert settings.heads_only
    assert model.exits == len(record["selection"]["clean"])
    exported = export_bundle(Path("x"), out=Path("bundles/x"))
    assert exported.calibration is not None
    images, labels = test_digits
    answers = Runtime.open(exported.bundle, budget="medium")(list(images))
    assert np.mean([answer.index == label for answer, label in zip(answers, labels, strict=True)]) > 0.8


def test_finetuning_starts_from_the_heads() -> None:
    """The same run in one call and as heads first, then more."""
    train(GIVEN | {"precision": "fp32"})
    heads = weights()
    result = train({"finetune": 2, "lr": 1e-4}, resume=True)
    assert [record["epoch"] for record in result.records] == [0, 1, 2]
    assert all(torch.equal(heads[name], value) for name, value in weights("weights-epoch0-step0.safetensors").items())
    moved = [name for name, value in weights().items() if not torch.equal(heads[name], value)]
    assert any(".trunk." in name for name in moved)
    assert any(".head." in name for name in moved)


@pytest.mark.long
def test_a_stop_during_finetuning_resumes_to_the_same_weights() -> None:
    train(TUNED)
    whole = weights()
    for file in Path("x").iterdir():
        file.unlink()
    calls = iter(range(1000))
    stopped = train(TUNED, should_stop=lambda: next(calls) == FROZEN_BATCHES + EXITS + 2)
    assert not stopped.finished
    assert (Path("x") / checkpoint.CHECKPOINT).exists()
    assert train({}, resume=True).finished
    assert all(torch.equal(whole[name], value) for name, value in weights().items())


def test_a_stop_during_the_frozen_pass_leaves_a_run_that_begins_again() -> None:
    calls = iter(range(100))
    assert not train(GIVEN, should_stop=lambda: next(calls) == 2).finished
    assert not (Path("x") / checkpoint.CHECKPOINT).exists()
    assert not (Path("x") / checkpoint.WEIGHTS).exists()
    assert train({}, resume=True).finished


def test_an_error_in_the_frozen_pass_leaves_nothing() -> None:
    calls = iter(range(100))

    def fail() -> bool:
        if next(calls) == 2:
            raise BadInput("the third batch is unreadable")
        return False

    with pytest.raises(BadInput, match="third batch"):
        train(GIVEN, should_stop=fail)
    assert not Path("x").exists()


@pytest.mark.long
def test_the_command_says_what_it_does_and_refuses_other_lengths() -> None:
    shown = typed("train", "--freeze", "--model", "digits-cnn", "--threads", "1", "--out", "x")
    assert "training the 3 heads of digits-cnn on digits" in " ".join(shown.stderr.split())
    assert "x: heads of the frozen network" in shown.stdout
    assert "--finetune N" in refused("train", "--freeze", "--model", "digits-cnn", "--epochs", "3", code=2)
    shown = typed("train", "--resume", "--finetune", "1", "--threads", "1", "--out", "x")
    assert "x: 1 epochs" in shown.stdout
