"""Published schedules: their values, what wins over them, and the command and Python giving the same settings."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import refused, typed
from PIL import Image

from mexit.data.splits import Splits
from mexit.errors import UsageError
from mexit.flows.train import TrainOptions, train_model
from mexit.models import model_spec
from mexit.train.config import TrainSettings, resolve
from mexit.train.methods import METHODS
from mexit.train.presets import PRESETS

HALVES = {"clean_weight": 0.5, "attacked_weight": 0.5}


def rates(settings: TrainSettings, *fractions: float) -> list[float]:
    return [settings.lr_at(fraction) for fraction in fractions]


def test_neo_kd_schedule_for_mnist() -> None:
    settings = resolve("mnist", "neo_kd", {})
    assert (settings.method, settings.attack) == ("neo-kd", "max-average")
    assert (settings.epochs, settings.batch, settings.lr, settings.weight_decay) == (150, 128, 0.01, 5e-4)
    assert (settings.eps, settings.step, settings.steps, settings.test_steps) == (0.3, 20 / 255, 7, 50)
    assert rates(settings, 49.9 / 150, 50 / 150) == pytest.approx([0.01, 0.001])


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_neo_kd_schedule_for_cifar(data: str) -> None:
    settings = resolve(data, None, {})
    assert (settings.preset, settings.method, settings.model) == ("neo_kd", "neo-kd", f"msdnet-{data}")
    assert (settings.epochs, settings.batch, settings.lr, settings.weight_decay) == (150, 128, 0.1, 5e-4)
    assert (settings.eps, settings.step, settings.steps, settings.test_steps) == (8 / 255, 2 / 255, 7, 50)
    assert (settings.attack, settings.augment, settings.craft_train_mode) == ("max-average", "crop-flip", False)
    assert settings.momentum == 0.9
    expected = [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert rates(settings, *(epoch / 150 for epoch in (0, 74.9, 75, 114.9, 115, 149))) == pytest.approx(expected)


def test_neo_kd_schedule_for_tiny_imagenet() -> None:
    settings = resolve("tiny-imagenet", None, {})
    assert (settings.preset, settings.model, settings.attack) == ("neo_kd", "msdnet-tiny-imagenet", "max-average")
    assert (settings.epochs, settings.batch, settings.lr, settings.weight_decay) == (150, 128, 0.1, 5e-4)
    expected = [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert rates(settings, *(epoch / 150 for epoch in (0, 49.9, 50, 99.9, 100, 149))) == pytest.approx(expected)


def test_neo_kd_schedule_for_imagenet_has_a_constant_learning_rate() -> None:
    settings = resolve("imagenet", None, {})
    assert (settings.preset, settings.model, settings.attack) == ("neo_kd", "msdnet-imagenet", "max-average")
    assert set(rates(settings, 0, 0.3, 0.6, 1)) == {0.001}


@pytest.mark.parametrize("data", ["tiny-imagenet", "imagenet"])
def test_neo_kd_attack_for_both_imagenets(data: str) -> None:
    settings = resolve(data, None, {})
    assert (settings.eps, settings.steps, settings.test_steps) == (2 / 255, 7, 50)
    assert settings.step == pytest.approx(0.0052, abs=5e-5), "two thirds of eps"
    assert model_spec(settings.model).exits == 5


def test_rdi_schedule_for_mnist() -> None:
    settings = resolve("mnist", "rdi", {})
    assert (settings.method, dict(settings.options)) == ("adversarial", HALVES)
    assert (settings.batch, settings.lr, settings.steps, settings.step) == (256, 0.033, 40, 0.01)
    assert settings.craft_train_mode
    assert rates(settings, 0.89, 0.9, 0.99) == pytest.approx([0.033, 0.0033, 0.00033])


def test_rdi_schedule_for_cifar() -> None:
    settings = resolve("cifar10", "rdi", {})
    assert (settings.method, dict(settings.options)) == ("adversarial", HALVES)
    assert (settings.model, settings.batch, settings.lr) == ("resnet38", 128, 0.1)
    assert settings.epochs == round(64_000 * 128 / 50_000)
    assert (settings.weight_decay, settings.eps, settings.step) == (1e-4, 8 / 255, 2 / 255)
    assert (settings.steps, settings.test_steps, settings.craft_train_mode) == (10, 20, True)
    expected = [0.1, 0.01, 0.01, 0.001]
    assert rates(settings, *(thousand / 64 for thousand in (31.9, 32, 47.9, 48))) == pytest.approx(expected)


def test_rdi_schedule_for_mobilenetv2() -> None:
    settings = resolve("cifar10", "rdi_mobilenetv2", {})
    assert (settings.method, dict(settings.options)) == ("adversarial", HALVES)
    assert (settings.model, settings.lr, settings.epochs) == ("mobilenetv2", 0.05, round(82_000 * 128 / 50_000))
    expected = [0.05, 0.005, 0.0005, 0.00005]
    assert rates(settings, *(thousand / 82 for thousand in (61.6, 61.7, 70, 78))) == pytest.approx(expected)


def test_hdkd_schedule_for_cifar_100() -> None:
    settings = resolve("cifar100", "hdkd", {})
    assert (settings.method, settings.attack, settings.options) == ("hdkd", METHODS["hdkd"].default_attack, {})
    assert (settings.epochs, settings.batch, settings.lr) == (300, 128, 0.1)
    assert rates(settings, *(epoch / 300 for epoch in (149, 150, 225))) == pytest.approx([0.1, 0.01, 0.001])


def test_every_preset_names_its_method() -> None:
    for presets in PRESETS.values():
        for name, values in presets.items():
            assert values["method"] in METHODS, name


def test_grey_data_sets_are_not_augmented() -> None:
    assert {resolve(data, None, {}).augment for data in ("digits", "mnist")} == {"none"}


def test_a_given_method_takes_no_options_from_the_preset() -> None:
    settings = resolve("cifar10", "rdi", {"method": "neo-kd"})
    assert (settings.method, settings.options, settings.model) == ("neo-kd", {}, "resnet38")


def test_given_options_are_added_to_those_of_the_preset() -> None:
    settings = resolve("cifar10", "rdi", {"options": {"clean_weight": 0.2}})
    assert settings.options == {"clean_weight": 0.2, "attacked_weight": 0.5}


def test_a_given_model_wins() -> None:
    assert resolve("cifar10", "rdi", {"model": "mobilenetv2"}).model == "mobilenetv2"


def test_an_unknown_preset_names_those_that_exist() -> None:
    with pytest.raises(UsageError, match="neo_kd, rdi"):
        resolve("mnist", "best", {})


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a miniature of CIFAR-10 in its own format."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("data")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        data = rng.integers(0, 256, (50, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [k % 10 for k in range(50)]}, 2))
    names = [f"class {label}" for label in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, 2))
    return root


SMALL: dict[str, Any] = {"model": "digits-cnn", "epochs": 1, "steps": 1}
SMALL_FLAGS = ("--model", "digits-cnn", "--epochs", 1, "--steps", 1, "--threads", 1)


@pytest.mark.parametrize(
    ("preset", "flags", "given", "method", "options", "losses"),
    [
        ("hdkd", (), {}, "hdkd", {}, {"loss ce", "loss kd"}),
        ("rdi", (), {}, "adversarial", HALVES, {"loss clean", "loss attacked"}),
        ("rdi", ("--method", "neo-kd"), {"method": "neo-kd"}, "neo-kd", {}, {"loss nkd", "loss eokd"}),
        ("hdkd", ("--method", "clean"), {"method": "clean"}, "clean", {}, {"loss clean"}),
        (None, (), {}, "neo-kd", {}, {"loss nkd", "loss eokd"}),
    ],
    ids=["hdkd", "rdi", "rdi with neo-kd", "hdkd with clean", "default"],
)
def test_the_command_and_python_train_what_the_preset_names(
    preset: str | None,
    flags: tuple[str, ...],
    given: Mapping[str, Any],
    method: str,
    options: Mapping[str, float],
    losses: set[str],
    cifar: Path,
) -> None:
    named = () if preset is None else ("--preset", preset)
    result = typed(
        "train", "--data", "cifar10", *named, *flags, *SMALL_FLAGS, "--data-dir", cifar, "--out", "c", "--json"
    )
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["settings"]["method"], answer["settings"]["options"]) == (method, options)
    assert losses <= answer["log"][0].keys()
    python = train_model(
        data="cifar10",
        preset=preset,
        settings=SMALL | given,
        data_dir=cifar,
        out=Path("p"),
        options=TrainOptions(threads=1),
    )
    assert json.loads(json.dumps(python.settings)) == answer["settings"]
    assert losses <= python.records[0].keys()


def test_the_command_refuses_a_preset_of_another_data_set(cifar: Path) -> None:
    message = refused("train", "--data", "cifar10", "--data-dir", cifar, "--preset", "demo", code=2)
    assert "no preset 'demo' for cifar10: choose from neo_kd, rdi, rdi_mobilenetv2, hdkd" in message


@pytest.mark.slow
def test_a_run_on_a_miniature_of_cifar_10(cifar: Path) -> None:
    given = {"model": "msdnet-cifar10", "method": "adversarial", "attack": "average", "epochs": 1, "steps": 1}
    result = train_model(
        data="cifar10", settings=given, data_dir=cifar, out=Path("run"), options=TrainOptions(threads=1)
    )
    assert result.finished
    assert len(result.records[0]["selection"]["attacked"]) == 3


def test_a_run_on_a_miniature_of_imagenet(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("val", 4)):
        for wnid in ("n01440764", "n01443537"):
            folder = tmp_path / part / wnid
            folder.mkdir(parents=True)
            for k in range(count):
                Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(folder / f"{k}.JPEG")
    given = {"model": "digits-cnn", "method": "adversarial", "attack": "average", "epochs": 1, "steps": 1}
    result = train_model(
        data="imagenet", settings=given, data_dir=tmp_path, out=tmp_path / "run", options=TrainOptions(threads=1)
    )
    assert result.finished
    assert (result.settings["augment"], result.settings["lr"]) == ("resized-crop-flip", 0.001)
    assert Splits.load(tmp_path / "run" / "splits.npz").part("test").tolist() == list(range(80, 88))
