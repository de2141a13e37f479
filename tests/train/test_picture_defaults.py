"""Channels, size, network and length of a run on a folder follow from the pictures, the machine and the time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import refused, typed
from drawn_pictures import draw

from mexit.core.progress import Silent
from mexit.data import registry
from mexit.data.picture_sample import PictureSample
from mexit.errors import UsageError
from mexit.flows.train import TrainOptions, train_model
from mexit.train import checkpoint
from mexit.train.config import TrainSettings, resolve
from mexit.train.picture_defaults import (
    PASSES,
    Fit,
    fit_to_pictures,
    measure_normalisation,
    measure_speed,
    training_macs,
)
from mexit.train.precision import Precision

SIGNS = PictureSample((40, 41), grey=False)
TWO_CORES = 100e9  # MACs per second


def fit(
    pictures: PictureSample = SIGNS, images: int = 5000, speed: float = TWO_CORES, data: str = "folder:x", **given: Any
) -> Fit:
    return fit_to_pictures(resolve(data, None, given), given, pictures, images, 43, speed)


def chosen(found: Fit) -> tuple[str, tuple[int, int] | None, int | None, float]:
    settings = found.settings
    return settings.model, settings.size, settings.channels, settings.minutes


def test_small_colour_pictures_are_trained_on_in_their_own_size_if_time_allows() -> None:
    assert chosen(fit()) == ("wide-cnn-20m", (32, 32), 3, 10)
    found = fit(speed=2 * TWO_CORES)
    assert chosen(found) == ("wide-cnn-20m", (48, 48), 3, 10)
    assert found.passes == pytest.approx(2 * TWO_CORES * 0.8 * 600 / 5000 / training_macs(found.settings, 43))
    assert found.passes >= PASSES


@pytest.mark.parametrize(
    ("size", "side"), [((8, 8), 16), ((30, 28), 32), ((56, 50), 48), ((60, 70), 64), ((3000, 4000), 128)]
)
def test_the_size_is_that_of_the_pictures_rounded(size: tuple[int, int], side: int) -> None:
    assert fit(PictureSample(size, grey=False), speed=1e15).settings.size == (side, side)


def test_grey_pictures_get_one_channel() -> None:
    assert fit(PictureSample((40, 40), grey=True)).settings.channels == 1


def test_more_time_or_a_faster_machine_gives_a_wider_network_and_less_a_smaller_size() -> None:
    assert fit(speed=100 * TWO_CORES).settings.model == fit(minutes=1000.0).settings.model == "wide-cnn-40m"
    slow = fit(images=50_000)
    assert chosen(slow) == ("wide-cnn-10m", (32, 32), 3, 10)
    assert slow.passes < PASSES
    macs = [training_macs(fit(images=n).settings, 43) for n in (100_000, 20_000, 8_000, 4_000, 1_000)]
    assert macs == sorted(macs)


@pytest.mark.parametrize(
    ("images", "classes", "model"),
    [
        (2_000, 10, "wide-cnn-20m"),
        (20_000, 10, "wide-cnn-40m"),
        (40_000, 10, "wide-cnn"),
        (2_000, 150, "wide-cnn-40m"),
        (2_000, 1000, "wide-cnn"),
    ],
)
def test_the_network_fits_the_number_of_pictures_and_classes(images: int, classes: int, model: str) -> None:
    assert fit_to_pictures(resolve("folder:x", None, {}), {}, SIGNS, images, classes, 1e15).settings.model == model


def test_training_against_attacks_counts_their_steps() -> None:
    robust = fit(speed=2 * TWO_CORES, robust=8 / 255).settings
    clean = fit(speed=2 * TWO_CORES).settings
    assert (
        training_macs(robust, 43)
        / training_macs(resolve("folder:x", None, {"model": robust.model, "size": robust.size}), 43)
        == (6 + 2 * 5) / 3
    )
    assert robust.size is not None
    assert clean.size is not None
    assert robust.size < clean.size


def test_given_settings_stay() -> None:
    found = fit(model="wide-cnn", size=(24, 32), channels=1, minutes=3.0, lr=0.2).settings
    assert (found.model, found.size, found.channels, found.minutes, found.lr) == ("wide-cnn", (24, 32), 1, 3, 0.2)
    assert fit(size=(20, 20)).settings.size == (20, 20)
    assert fit(model="small-cnn").settings.model == "small-cnn"


def test_a_network_of_one_input_keeps_it() -> None:
    found = fit(model="resnet38").settings
    assert (found.size, found.channels) == (None, None)
    assert found.model_spec().input_shape == (3, 32, 32)
    with pytest.raises(UsageError, match="leave out --size"):
        resolve("folder:x", None, {"model": "resnet38", "size": (48, 48)}).model_spec()


def test_few_pictures_take_less_time_unless_it_is_given() -> None:
    assert fit(images=40).settings.minutes < 10
    assert fit(images=40, minutes=10.0).settings.minutes == 10
    assert fit(images=40, epochs=7).settings.minutes == 0


def test_a_network_without_batch_norm_gets_a_smaller_learning_rate() -> None:
    assert fit(model="small-cnn").settings.lr == 0.01
    assert fit(model="wide-cnn").settings.lr == 0.05


def test_the_speed_of_this_machine_is_measured() -> None:
    assert 1e7 < measure_speed(Precision("cpu", bf16=False, channels_last=False)) < 1e14


def test_the_normalisation_is_that_of_the_training_images(tmp_path: Path) -> None:
    data = registry.load(f"folder:{draw(tmp_path / 'own', 6)}")
    settings = resolve("folder:x", None, {"size": (20, 24), "channels": 3})
    index = np.array([0, 3, 8])
    found = measure_normalisation(data, index, settings)
    pixels = data.batch(index, settings.model_spec().input).astype(np.float64)
    assert found.mean == pytest.approx(pixels.mean(axis=(0, 2, 3)), abs=1e-4)
    assert found.std == pytest.approx(pixels.std(axis=(0, 2, 3)), abs=1e-4)
    assert found.model_spec().build(2).normalise.mean.flatten().tolist() == pytest.approx(found.mean)


def test_a_folder_is_trained_clean_with_the_choices_stored_and_shown(tmp_path: Path) -> None:
    notes: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    root = draw(tmp_path / "own")
    result = train_model(
        f"folder:{root}",
        settings={"epochs": 2},
        out=Path("runs/own"),
        options=TrainOptions(threads=1),
        progress=Notes(),
    )
    settings = checkpoint.load_settings(Path("runs/own"))
    assert (settings.method, settings.attack, settings.preset) == ("clean", "none", "pictures")
    assert (settings.size, settings.channels, settings.epochs, settings.minutes) == ((48, 48), 3, 2, 0)
    assert (settings.augment, settings.flip) == ("photo", None)
    assert len(settings.mean) == len(settings.std) == 3
    model, _, _ = checkpoint.load_model(Path("runs/own"))
    assert model.input_shape == (3, 48, 48)
    assert list(result.records[-1]["selection"]) == ["clean"]
    said = "\n".join(notes)
    for part in ("own", "2 epochs", "48 x 48 pixels, RGB", "no attack", "--size", "--flip", "--robust 8/255"):
        assert part in said
    assert max(len(line) for line in said.splitlines() if "runs/own" not in line) <= 80


@pytest.mark.parametrize("given", [{"robust": 0.02}, {"method": "neo-kd"}, {"attack": "average"}], ids=str)
def test_a_robust_run_uses_the_preset_with_an_attack(given: dict[str, Any]) -> None:
    settings = resolve("folder:x", None, given)
    assert settings.preset == "robust_pictures"
    assert settings.method == given.get("method", "adversarial")
    attack = settings.training_attack()
    assert attack is not None
    assert (attack.target_exits, attack.pgd.steps) == ("average", 5)
    assert attack.pgd.eps == given.get("robust", 8 / 255)
    assert attack.pgd.step_size == pytest.approx(attack.pgd.eps / 2)
    assert settings.augment == "photo"
    assert resolve("folder:x", None, given | {"steps": 2, "step": 0.007}).step == 0.007


@pytest.mark.parametrize("method", [None, "clean"])
def test_a_run_without_a_robust_method_is_clean(method: str | None) -> None:
    settings = resolve("folder:x", None, {"method": method})
    assert (settings.method, settings.attack, settings.preset) == ("clean", "none", "pictures")
    assert (settings.minutes, settings.augment) == (10, "photo")


def test_a_robust_radius_works_with_other_data_sets_and_methods() -> None:
    settings = resolve("mnist", None, {"robust": 0.1})
    assert (settings.method, settings.eps) == ("neo-kd", 0.1)
    assert settings.step == pytest.approx(0.1 * (20 / 255) / 0.3)
    assert resolve("digits", None, {"method": "mse", "robust": 0.1}).attack == "average"


@pytest.mark.parametrize(
    "given",
    [
        {"robust": 0.1, "method": "clean"},
        {"robust": 0.1, "attack": "none"},
        {"robust": 0.1, "eps": 0.2},
        {"attack": "single", "method": "clean"},
    ],
    ids=str,
)
def test_contradictions_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        resolve("folder:x", None, given)


def test_the_best_weights_can_be_kept_although_the_preset_measures_norms_again() -> None:
    assert resolve("folder:x", None, {"keep": "best"}).recompute_norms == 0
    with pytest.raises(UsageError, match="--keep last"):
        resolve("folder:x", None, {"keep": "best", "recompute_norms": 10})


@pytest.mark.slow
def test_options_of_the_command_change_the_choices(tmp_path: Path) -> None:
    root = draw(tmp_path / "own")
    result = typed(
        *("train", "--data", f"folder:{root}", "--epochs", 1, "--size", "24x32", "--channels", 1, "--flip"),
        *("--robust", "4/255", "--steps", 1, "--model", "wide-cnn-10m", "--batch", 8, "--threads", 1, "--out", "run"),
    )
    assert result.exit_code == 0, result.output
    settings: TrainSettings = checkpoint.load_settings(Path("run"))
    assert (settings.size, settings.channels, settings.flip, settings.batch) == ((24, 32), 1, True, 8)
    assert (settings.eps, settings.step, settings.attack) == (4 / 255, pytest.approx(2 / 255), "average")
    assert len(settings.mean) == 1


@pytest.mark.parametrize("size", ["0", "48x", "48x48x3", "a", "-3"])
def test_a_size_that_is_not_one_is_refused(size: str) -> None:
    assert "--size expects pixels, such as 64 or 48x96" in refused("train", "--size", size, code=2)
