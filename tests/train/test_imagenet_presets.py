"""The published schedules for Tiny-ImageNet and ImageNet, and a run on a miniature of the latter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mexit.data.splits import Splits
from mexit.flows.train import train_model
from mexit.models import model_spec
from mexit.train.config import resolve


def test_tiny_imagenet_schedule_is_the_published_one() -> None:
    found = resolve("tiny-imagenet", None, {})
    assert (found.preset, found.model, found.attack) == ("neo_kd", "msdnet-tiny-imagenet", "max-average")
    assert (found.epochs, found.batch, found.lr, found.momentum, found.weight_decay) == (150, 128, 0.1, 0.9, 5e-4)
    rates = [found.lr_at(epoch / 150) for epoch in (0, 49.9, 50, 99.9, 100, 149)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_imagenet_learning_rate_is_constant() -> None:
    found = resolve("imagenet", None, {})
    assert (found.preset, found.model, found.attack) == ("neo_kd", "msdnet-imagenet", "max-average")
    assert {found.lr_at(share) for share in (0, 0.3, 0.6, 1)} == {0.001}


@pytest.mark.parametrize("data", ["tiny-imagenet", "imagenet"])
def test_attack_and_exits_are_the_published_ones(data: str) -> None:
    found = resolve(data, None, {})
    assert (found.eps, found.steps, found.test_steps) == (2 / 255, 7, 50)
    assert found.step == pytest.approx(0.0052, abs=5e-5), "two thirds of eps"
    assert model_spec(found.model).exits == 5


def test_a_run_on_a_miniature_of_imagenet(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("val", 4)):
        for wnid in ("n01440764", "n01443537"):
            folder = tmp_path / part / wnid
            folder.mkdir(parents=True)
            for k in range(count):
                Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(folder / f"{k}.JPEG")
    given = {"model": "digits-cnn", "method": "adversarial", "attack": "average", "epochs": 1, "steps": 1}
    result = train_model(data="imagenet", given=given, data_dir=tmp_path, out=tmp_path / "run", threads=1)
    assert result.finished
    assert (result.settings["augment"], result.settings["lr"]) == ("resized-crop-flip", 0.001)
    assert Splits.load(tmp_path / "run" / "splits.npz").part("test").tolist() == list(range(80, 88))
