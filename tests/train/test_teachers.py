"""Teachers: loading them, training with them, and refusing unsuitable ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from command_line import refused

from mexit.data import digits
from mexit.data.splits import split
from mexit.errors import NotFound, UsageError
from mexit.flows.train import TrainOptions, train_model
from mexit.models import build_model, model_spec
from mexit.train import checkpoint
from mexit.train.config import TrainSettings
from mexit.train.methods import METHODS
from mexit.train.precision import Precision
from mexit.train.teachers import load_teachers

CLASSES = tuple(str(digit) for digit in range(10))
PLAIN = Precision("cpu", bf16=False, channels_last=False)
TINY = {"epochs": 2, "fraction": 0.1, "batch": 16, "steps": 1, "step": 0.05, "precision": "fp32", "lr": 0.01}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread and no plots."""
    torch.set_num_threads(1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def run_of(folder: Path, model: str = "digits-cnn", classes: int = 10, *, finished: bool = True) -> Path:
    """A run with initial weights, finished or stopped."""
    torch.manual_seed(3)
    settings = TrainSettings(model=model, method="clean", attack="none")
    network = build_model(model, classes)
    run = folder / f"{model}-{classes}"
    checkpoint.create_run(run, settings, split(digits.load()))
    if finished:
        checkpoint.save_weights(run, network.state_dict(), settings, classes)
    else:
        state = checkpoint.TrainState(checkpoint.Position(0, 1, {}, None, 0), {}, {}, {})
        checkpoint.save(run, network, torch.optim.SGD(network.parameters(), lr=0.1), state)
    return run


def student(*runs: Path, method: str = "skd") -> TrainSettings:
    return TrainSettings(method=method, teachers=tuple(str(run) for run in runs))


def test_teachers_are_loaded_frozen_and_in_eval_mode(tmp_path) -> None:
    """A teacher may have another network with other exits, if the images have the same shape."""
    first, second = run_of(tmp_path), run_of(tmp_path, "digits-cnn-single")
    teachers = load_teachers(student(first, second), CLASSES, PLAIN)
    assert [teacher.exits for teacher in teachers] == [3, 1]
    expected = checkpoint.load_model(first)[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in teachers[0].state_dict().items())
    assert not any(teacher.training for teacher in teachers)
    assert not any(parameter.requires_grad for teacher in teachers for parameter in teacher.parameters())


def test_settings_without_teachers_load_none() -> None:
    assert load_teachers(student(), CLASSES, PLAIN) == ()


def test_a_teacher_with_other_classes_is_refused_with_both_numbers(tmp_path) -> None:
    run = run_of(tmp_path, classes=7)
    with pytest.raises(UsageError, match=r"digits-cnn-7 \(digits-cnn\) has 7 classes .* digits-cnn here needs 10"):
        load_teachers(student(run), CLASSES, PLAIN)


def test_a_teacher_with_other_images_is_refused_with_both_shapes(tmp_path) -> None:
    run = run_of(tmp_path, "small-cnn")
    with pytest.raises(UsageError, match=r"small-cnn.* images \(1, 28, 28\), .* and \(1, 8, 8\)"):
        load_teachers(student(run), CLASSES, PLAIN)


def test_a_missing_or_unfinished_teacher_is_refused_with_the_command_to_run(tmp_path) -> None:
    with pytest.raises(NotFound, match=r"nowhere does not exist: make one with mexit train"):
        load_teachers(student(tmp_path / "nowhere"), CLASSES, PLAIN)
    run = run_of(tmp_path, finished=False)
    with pytest.raises(NotFound, match=f"is not finished: mexit train --resume --out {run}"):
        load_teachers(student(run), CLASSES, PLAIN)


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if not kind.uses_teachers])
def test_a_method_that_takes_no_teacher_names_those_that_do(method, tmp_path) -> None:
    with pytest.raises(UsageError, match=rf"method {method} takes no --teacher; .*skd, ard"):
        load_teachers(student(tmp_path, method=method), CLASSES, PLAIN)


def test_a_refused_teacher_creates_no_run(tmp_path) -> None:
    run = run_of(tmp_path, classes=7)
    message = refused("train", "--method", "ard", "--teacher", run, "--out", tmp_path / "student", code=2)
    assert "has 7 classes" in message
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize("method", ["skd", "ard"])
def test_a_student_is_closer_to_its_teacher_than_a_network_trained_without(method, tmp_path) -> None:
    teacher = run_of(tmp_path)
    data = digits.load()
    images = torch.from_numpy(data.batch(split(data).part("selection"), model_spec("digits-cnn").input))
    given = TINY | {"method": method, "lr": 0.05, "epochs": 3, "options": {"share": 1.0, "temperature": 4.0}}

    def distance(name: str, teachers: tuple[str, ...]) -> float:
        run = train_model(
            settings=given | {"teachers": teachers}, out=tmp_path / name, options=TrainOptions(threads=1)
        ).run
        with torch.no_grad():
            target = (checkpoint.load_model(teacher)[0](images)[-1] / 4).softmax(-1)
            logs = (checkpoint.load_model(run)[0](images) / 4).log_softmax(-1)
        return float((target * (target.log() - logs)).sum(-1).mean())

    with_teacher = distance("with", (str(teacher),))
    assert with_teacher < 0.5 * distance("without", ())
    assert checkpoint.load_settings(tmp_path / "with").teachers == (str(teacher),)


def test_a_student_is_resumed_with_its_teacher(tmp_path) -> None:
    given = TINY | {"method": "skd", "teachers": (str(run_of(tmp_path)),)}
    train_model(settings=given, out=tmp_path / "whole", options=TrainOptions(threads=1))
    asked = iter(range(1, 100))
    assert not train_model(
        settings=given, out=tmp_path / "x", options=TrainOptions(threads=1, should_stop=lambda: next(asked) == 3)
    ).finished
    assert train_model(out=tmp_path / "x", resume=True, options=TrainOptions(threads=1)).finished
    whole, resumed = (checkpoint.load_model(tmp_path / name)[0].state_dict() for name in ("whole", "x"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
