"""Published schedules, and how typed settings override them."""

from __future__ import annotations

import json

import pytest

from mexit.errors import Damaged, UsageError
from mexit.train.config import TrainSettings, resolve


def test_neo_kd_schedule_for_mnist_is_the_published_one() -> None:
    settings = resolve("mnist", "neo_kd", {})
    assert (settings.epochs, settings.batch, settings.lr, settings.weight_decay) == (150, 128, 0.01, 5e-4)
    assert (settings.eps, settings.step, settings.steps, settings.test_steps) == (0.3, 20 / 255, 7, 50)
    assert settings.attack == "max-average"
    assert settings.lr_at(49.9 / 150) == 0.01
    assert settings.lr_at(50 / 150) == pytest.approx(0.001)


def test_rdi_schedule_for_mnist_is_the_published_one() -> None:
    settings = resolve("mnist", "rdi", {"method": "adversarial"})
    assert (settings.batch, settings.lr, settings.steps, settings.step) == (256, 0.033, 40, 0.01)
    assert settings.craft_train_mode
    assert dict(settings.options) == {"clean_weight": 0.5, "attacked_weight": 0.5}
    assert [settings.lr_at(x) for x in (0.89, 0.9, 0.99)] == pytest.approx([0.033, 0.0033, 0.00033])


def test_decay_points_scale_with_epochs() -> None:
    short = resolve("mnist", None, {"epochs": 6})
    assert short.lr_at(1.99 / 6) == 0.01
    assert short.lr_at(2 / 6) == pytest.approx(0.001)


def test_what_was_typed_wins_and_none_counts_as_not_typed() -> None:
    settings = resolve("digits", None, {"lr": 0.5, "eps": None, "model": None})
    assert (settings.lr, settings.eps, settings.model) == (0.5, 0.1, "digits-cnn")


def test_a_clean_method_trains_on_no_attack() -> None:
    assert resolve("digits", None, {"method": "clean"}).training_attack() is None


def test_settings_survive_their_file() -> None:
    settings = resolve("mnist", None, {"options": {"alpha": 2.0}})
    assert TrainSettings.from_json(json.loads(json.dumps(settings.to_json())), "settings.json") == settings


@pytest.mark.parametrize(
    "given",
    [
        {"epochs": 0},
        {"lr": 0.0},
        {"momentum": 1.0},
        {"keep": "first"},
        {"recipe": "fp16"},
        {"eps": 8.0},
        {"attack": "pgd"},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(given) -> None:
    with pytest.raises(UsageError):
        resolve("digits", None, given)


def test_an_unknown_preset_names_those_that_exist() -> None:
    with pytest.raises(UsageError, match="neo_kd, rdi"):
        resolve("mnist", "best", {})


def test_a_damaged_settings_file_names_the_field() -> None:
    broken = resolve("digits", None, {}).to_json() | {"epochs": "many"}
    with pytest.raises(Damaged, match=r"settings\.json\.epochs"):
        TrainSettings.from_json(broken, "settings.json")


def test_parameters_of_the_attack_reach_it() -> None:
    typed = {"norm": "l2", "rule": "raw", "loss": "margin", "restarts": 2, "attack": "single"}
    attack = resolve("digits", None, typed).training_attack()
    assert attack is not None
    assert (attack.loss, attack.objective) == ("margin", "single")
    assert (attack.steps.norm, attack.steps.rule, attack.steps.restarts) == ("l2", "raw", 2)
    tested = resolve("digits", None, typed).test_attack("average")
    assert (tested.steps.norm, tested.steps.rule, tested.steps.restarts, tested.loss) == ("l2", "sign", 2, "ce")


def test_the_penalty_rule_starts_at_the_image() -> None:
    attack = resolve("digits", None, {"rule": "penalty"}).training_attack()
    assert attack is not None
    assert not attack.steps.random_start


@pytest.mark.parametrize(
    ("typed", "part"),
    [
        ({"norm": "l1"}, "linf, l2"),
        ({"rule": "adam"}, "inverse-clip"),
        ({"loss": "hinge"}, "margin"),
        ({"restarts": 0}, "at least 1"),
        ({"method": "neo-kd", "attack": "none"}, "--attack average"),
        ({"trades": 6.0, "method": "clean"}, "TRADES"),
        ({"fraction": 0.0}, "fraction"),
        ({"ema": 1.0}, "ema"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(typed, part) -> None:
    with pytest.raises(UsageError, match=part):
        resolve("digits", None, typed)


def test_a_run_from_before_a_setting_existed_is_read_with_what_it_did() -> None:
    stored = resolve("digits", None, {}).to_json()
    for name in ("norm", "rule", "loss", "restarts", "trades", "awp", "ema", "label_smoothing", "teachers"):
        del stored[name]
    del stored["fraction"], stored["omit_class"]
    assert TrainSettings.from_json(json.loads(json.dumps(stored)), "here") == resolve("digits", None, {})
    del stored["lr"]
    with pytest.raises(Damaged, match="lr"):
        TrainSettings.from_json(json.loads(json.dumps(stored)), "here")


@pytest.mark.parametrize(("name", "other"), [("data", "mnist"), ("preset", "rdi")])
def test_two_names_of_one_thing_are_refused(name: str, other: str) -> None:
    own = resolve("digits", None, {})
    assert resolve("digits", None, {name: getattr(own, name)}) == own
    with pytest.raises(UsageError, match=f"name the {name} {other}, and {getattr(own, name)} is asked for"):
        resolve("digits", None, {name: other})
