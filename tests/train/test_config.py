"""The settings of a run: how they are resolved, checked and stored."""

from __future__ import annotations

import json

import pytest

from mexit.errors import Damaged, UsageError
from mexit.train.config import TrainSettings, resolve

# The settings that `mexit demo` of 0.1.0 stored.
STORED_BY_0_1 = """{
 "data": "digits", "model": "digits-cnn", "method": "neo-kd", "options": {}, "preset": "demo",
 "attack": "average", "eps": 0.1, "step": 0.025, "steps": 7, "test_steps": 50, "norm": "linf", "rule": "sign",
 "restarts": 1, "loss": "ce", "craft_train_mode": false, "epochs": 20, "batch": 64, "lr": 0.03, "momentum": 0.9,
 "weight_decay": 0.0005, "decay_at": [0.6, 0.85], "decay_factor": 0.1, "augment": "none", "seed": 0,
 "recipe": "fp32", "keep": "last", "trades": 0.0, "awp": 0.0, "ema": 0.0, "label_smoothing": 0.0, "teachers": [],
 "fraction": 1.0, "omit_class": null
}"""


def test_decay_points_scale_with_epochs() -> None:
    short = resolve("mnist", None, {"epochs": 6})
    assert short.lr_at(1.99 / 6) == 0.01
    assert short.lr_at(2 / 6) == pytest.approx(0.001)


def test_given_values_win_and_none_counts_as_not_given() -> None:
    settings = resolve("digits", None, {"lr": 0.5, "eps": None, "model": None})
    assert (settings.lr, settings.eps, settings.model) == (0.5, 0.1, "digits-cnn")


def test_a_clean_method_trains_on_no_attack() -> None:
    assert resolve("digits", None, {"method": "clean"}).training_attack() is None


def test_stored_settings_are_read_back() -> None:
    settings = resolve("mnist", None, {"options": {"alpha": 2.0}})
    assert TrainSettings.from_json(json.loads(json.dumps(settings.to_json())), "settings.json") == settings


def test_settings_of_0_1_0_are_read() -> None:
    settings = TrainSettings.from_json(json.loads(STORED_BY_0_1), "settings.json")
    assert settings == resolve("digits", None, {"precision": "fp32"})


@pytest.mark.parametrize(
    ("method", "options"), [("cap", {"clean_weight": 0.0, "mix": False}), ("mse", {"ramp": 0.0}), ("skd", {})]
)
def test_a_run_of_0_1_0_keeps_the_defaults_that_its_method_had(method, options) -> None:
    stored = json.loads(STORED_BY_0_1) | {"method": method}
    assert TrainSettings.from_json(stored, "settings.json").options == options
    stored["options"] = dict.fromkeys(list(options)[:1], 0.5)
    assert TrainSettings.from_json(stored, "settings.json").options == options | stored["options"]


@pytest.mark.parametrize(
    "given",
    [
        {"epochs": 0},
        {"batch": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"seed": -1},
        {"keep": "first"},
        {"precision": "fp16"},
        {"label_smoothing": 1.0},
        {"eps": 8.0},
        {"attack": "pgd"},
    ],
    ids=str,
)
def test_values_outside_their_range_are_refused(given) -> None:
    with pytest.raises(UsageError):
        resolve("digits", None, given)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(UsageError, match="no setting epoch"):
        resolve("digits", None, {"epoch": 3})


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(
        UsageError, match="none, shift, crop-flip, reflect-crop-flip, resized-crop-flip, photo, found 'mixup'"
    ):
        resolve("cifar10", None, {"augment": "mixup"})


def test_a_damaged_settings_file_names_the_field() -> None:
    broken = resolve("digits", None, {}).to_json() | {"epochs": "many"}
    with pytest.raises(Damaged, match=r"settings\.json\.epochs"):
        TrainSettings.from_json(broken, "settings.json")


def test_parameters_of_the_attack_reach_it() -> None:
    given = {"norm": "l2", "rule": "raw", "loss": "margin", "restarts": 2, "attack": "single"}
    attack = resolve("digits", None, given).training_attack()
    assert attack is not None
    assert (attack.loss, attack.target_exits) == ("margin", "single")
    assert (attack.pgd.norm, attack.pgd.rule, attack.pgd.restarts) == ("l2", "raw", 2)
    tested = resolve("digits", None, given).test_attack("average")
    assert (tested.pgd.norm, tested.pgd.rule, tested.pgd.restarts, tested.loss) == ("l2", "sign", 2, "ce")


def test_the_penalty_rule_starts_at_the_image() -> None:
    attack = resolve("digits", None, {"rule": "penalty"}).training_attack()
    assert attack is not None
    assert not attack.pgd.random_start


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"norm": "l1"}, "linf, l2"),
        ({"rule": "adam"}, "inverse-clip"),
        ({"loss": "hinge"}, "margin"),
        ({"restarts": 0}, "at least 1"),
        ({"method": "neo-kd", "attack": "none"}, "--attack average"),
        ({"trades": 6.0, "method": "clean"}, "--trades needs attacked images"),
        ({"fraction": 0.0}, "fraction"),
        ({"ema": 1.0}, "ema"),
    ],
)
def test_a_refusal_names_the_allowed_values(given, part) -> None:
    with pytest.raises(UsageError, match=part):
        resolve("digits", None, given)


def test_a_run_from_before_a_setting_existed_gets_the_value_it_used() -> None:
    stored = json.loads(STORED_BY_0_1)
    for name in ("norm", "rule", "loss", "restarts", "trades", "awp", "ema", "label_smoothing", "teachers"):
        del stored[name]
    del stored["fraction"], stored["omit_class"]
    assert TrainSettings.from_json(stored, "here") == resolve("digits", None, {"precision": "fp32"})
    del stored["lr"]
    with pytest.raises(Damaged, match="lr"):
        TrainSettings.from_json(stored, "here")


@pytest.mark.parametrize(("name", "other"), [("data", "mnist"), ("preset", "rdi")])
def test_two_different_values_of_one_setting_are_refused(name: str, other: str) -> None:
    own = resolve("digits", None, {})
    assert resolve("digits", None, {name: getattr(own, name)}) == own
    with pytest.raises(UsageError, match=f"two values for {name}: {other} .* and {getattr(own, name)}"):
        resolve("digits", None, {name: other})
