"""Settings of runs that start from a frozen network: defaults, and combinations that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mexit.errors import UsageError
from mexit.models import model_spec
from mexit.train.changed_settings import change_settings
from mexit.train.checkpoint import Position, is_finished
from mexit.train.config import TrainSettings, resolve
from mexit.train.frozen_settings import weights_of_heads
from mexit.train.optimiser import HEAD_RATE, NEW_HEAD_RATE, build_optimiser, set_lr

NETWORK = {"model": "digits-cnn"}
AT_HEADS = Position(0, 0, {}, None, 0)


def test_freeze_alone_trains_heads_on_clean_images() -> None:
    settings = resolve("folder:pictures", None, {"model": "wide-cnn", "freeze": True})
    assert settings.heads_only
    assert (settings.model, settings.preset, settings.kind) == ("wide-cnn", "finetune", "frozen")
    assert (settings.epochs, settings.minutes, settings.attack) == (0, 0.0, "none")
    assert is_finished(AT_HEADS, settings)


@pytest.mark.parametrize("data", ["digits", "cifar10", "folder:pictures"])
def test_finetune_implies_freeze_and_distils_from_the_last_exit(data: str) -> None:
    settings = resolve(data, None, NETWORK | {"finetune": 4})
    assert (settings.freeze, settings.finetune, settings.epochs, settings.minutes) == (True, 4, 4, 0.0)
    assert (settings.method, settings.attack, settings.kind) == ("skd", "none", "skd")
    assert settings.options["temperature"] == 2.0, "an adaptive one grows without end under a confident teacher"
    assert not is_finished(AT_HEADS, settings)


def test_finetuning_by_the_clock() -> None:
    settings = resolve("digits", None, NETWORK | {"freeze": True, "minutes": 3.0})
    assert (settings.epochs, settings.minutes, settings.heads_only) == (0, 3.0, False)


def test_finetuning_against_attacks() -> None:
    settings = resolve("digits", None, NETWORK | {"finetune": 4, "robust": 4 / 255})
    assert (settings.preset, settings.method, settings.attack) == ("robust_finetune", "skd", "average")
    assert (settings.eps, settings.step) == pytest.approx((4 / 255, 2 / 255))
    other = resolve("digits", None, NETWORK | {"finetune": 4, "method": "neo-kd"})
    assert (other.preset, other.method, other.attack) == ("robust_finetune", "neo-kd", "average")


def test_freeze_needs_a_network() -> None:
    with pytest.raises(UsageError, match="name one with --model"):
        resolve("digits", None, {"freeze": True})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"finetune": 0}, "--finetune 0 trains nothing: give at least 1, or --freeze"),
    ({"freeze": True, "epochs": 3}, "--finetune N"),
    ({"finetune": 2, "epochs": 3}, "--finetune N"),
    ({"finetune": 2, "minutes": 3.0}, "give one of them"),
    ({"freeze": True, "method": "neo-kd"}, "--method would change nothing"),
    ({"freeze": True, "robust": 8 / 255, "lr": 0.1}, "--lr, --robust would change nothing"),
    ({"freeze": True, "teachers": ("x",)}, "--teacher would change nothing"),
    ({"freeze": False, "finetune": 2}, "freeze=False"),
    ({"finetune": -1}, "--finetune must be at least 0"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=[",".join(given) for given, _ in REFUSED])
def test_contradictions_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        resolve("digits", None, NETWORK | given)


def test_settings_survive_their_file_and_those_of_older_runs_are_not_frozen() -> None:
    settings = resolve("digits", None, NETWORK | {"finetune": 4})
    stored = json.loads(json.dumps(settings.to_json()))
    assert TrainSettings.from_json(stored, "x").finetune == 4
    del stored["freeze"], stored["finetune"]
    assert not TrainSettings.from_json(stored, "x").freeze


def changed(given: dict[str, Any], stored: TrainSettings) -> TrainSettings:
    return change_settings(Path("x"), stored, given, AT_HEADS)


def test_resume_adds_finetuning_to_heads() -> None:
    heads = resolve("digits", None, NETWORK | {"freeze": True})
    settings = changed({"finetune": 3}, heads)
    assert (settings.finetune, settings.epochs, settings.heads_only) == (3, 3, False)
    by_clock = changed({"minutes": 2.0}, heads)
    assert (by_clock.minutes, by_clock.epochs) == (2.0, 0)
    again = changed({"finetune": 5}, by_clock)
    assert (again.minutes, again.epochs, again.finetune) == (0.0, 5, 5)


def test_resume_refuses_the_length_of_the_other_kind_of_run() -> None:
    heads, plain = resolve("digits", None, NETWORK | {"freeze": True}), resolve("digits", None, {"epochs": 3})
    with pytest.raises(UsageError, match="give --finetune"):
        changed({"epochs": 3}, heads)
    with pytest.raises(UsageError, match="give --epochs"):
        changed({"finetune": 3}, plain)
    with pytest.raises(UsageError, match="--freeze"):
        changed({"freeze": True}, plain)


def test_trained_heads_have_a_smaller_learning_rate_than_the_backbone() -> None:
    model = model_spec("digits-cnn").build(10)
    optimiser = build_optimiser(model, resolve("digits", None, NETWORK | {"finetune": 1}))
    set_lr(optimiser, 0.5)
    rates = {id(one): group["lr"] for group in optimiser.param_groups for one in group["params"]}
    expected = {name: 0.5 * HEAD_RATE if ".head." in name else 0.5 for name, _ in model.named_parameters()}
    assert {name: rates[id(parameter)] for name, parameter in model.named_parameters()} == pytest.approx(expected)


def test_the_weights_of_exits_follow_the_accuracy_of_their_heads() -> None:
    weights = weights_of_heads([0.05, 0.1, 0.55, 0.7, 0.92, 0.9], classes=10)
    assert weights == (0.0, 0.0, round((0.45 / 0.8) ** 4, 3), round((0.6 / 0.8) ** 4, 3), 1.0, 1.0)
    assert weights_of_heads([0.1, 0.05], classes=10) == (0.0, 1.0), "no head is better than chance"


def test_folders_finetune_your_own_network_without_freeze() -> None:
    given = {"model": "efficientnet-lite0"}
    settings = resolve("folder:pictures", None, given)
    assert (settings.preset, settings.lr, settings.minutes, settings.freeze) == ("finetune", 0.0001, 10.0, False)
    assert resolve("folder:pictures", None, given | {"robust": 4 / 255}).preset == "robust_finetune"
    assert resolve("folder:pictures", None, given | {"epochs": 2}).minutes == 0.0
    assert resolve("folder:pictures", None, {"model": "wide-cnn"}).preset == "pictures"


def test_new_heads_have_a_larger_learning_rate_than_the_backbone() -> None:
    model = model_spec("digits-cnn").build(10)
    optimiser = build_optimiser(model, resolve("digits", "finetune", NETWORK))
    rates = {id(one): group["lr"] for group in optimiser.param_groups for one in group["params"]}
    expected = {name: 0.0001 * (NEW_HEAD_RATE if ".head." in name else 1) for name, _ in model.named_parameters()}
    assert {name: rates[id(parameter)] for name, parameter in model.named_parameters()} == pytest.approx(expected)


def test_fixed_norms_keep_their_statistics_in_train_mode() -> None:
    network = model_spec("wide-cnn-10m").build(10)
    network.fixed_norms = True
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()(torch.rand(4, 3, 32, 32))
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
