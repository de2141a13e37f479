"""The published schedules for CIFAR, and a run on a miniature of it."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from mexit.errors import UsageError
from mexit.flows.train import train_model
from mexit.train.config import resolve


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_neo_kd_schedule_is_the_published_one(data) -> None:
    found = resolve(data, None, {})
    assert (found.preset, found.model, found.attack) == ("neo_kd", f"msdnet-{data}", "max-average")
    assert (found.epochs, found.batch, found.lr, found.weight_decay) == (150, 128, 0.1, 5e-4)
    assert (found.eps, found.step, found.steps, found.test_steps) == (8 / 255, 2 / 255, 7, 50)
    assert (found.momentum, found.augment, found.craft_train_mode) == (0.9, "crop-flip", False)
    rates = [found.lr_at(epoch / 150) for epoch in (0, 74.9, 75, 114.9, 115, 149)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_rdi_schedule_is_the_published_one() -> None:
    found = resolve("cifar10", "rdi", {"method": "adversarial"})
    assert (found.model, found.epochs, found.batch, found.lr) == ("resnet38", 164, 128, 0.1)
    assert found.epochs == round(64_000 * 128 / 50_000)
    assert (found.weight_decay, found.eps, found.step) == (1e-4, 8 / 255, 2 / 255)
    assert (found.steps, found.test_steps, found.craft_train_mode, found.augment) == (10, 20, True, "crop-flip")
    assert dict(found.options) == {"clean_weight": 0.5, "attacked_weight": 0.5}
    rates = [found.lr_at(thousand / 64) for thousand in (31.9, 32, 47.9, 48)]
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001])


def test_rdi_schedule_of_mobilenetv2() -> None:
    found = resolve("cifar10", "rdi_mobilenetv2", {"method": "adversarial"})
    assert (found.model, found.lr, found.epochs) == ("mobilenetv2", 0.05, round(82_000 * 128 / 50_000))
    assert dict(found.options) == {"clean_weight": 0.5, "attacked_weight": 0.5}
    rates = [found.lr_at(thousand / 82) for thousand in (61.6, 61.7, 70, 78)]
    assert rates == pytest.approx([0.05, 0.005, 0.0005, 0.00005])


def test_a_model_that_was_typed_wins() -> None:
    assert resolve("cifar10", "rdi", {"model": "mobilenetv2"}).model == "mobilenetv2"


def test_grey_data_sets_are_not_augmented() -> None:
    assert {resolve(data, None, {}).augment for data in ("digits", "mnist")} == {"none"}


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(UsageError, match="none, crop-flip, resized-crop-flip, found 'mixup'"):
        resolve("cifar10", None, {"augment": "mixup"})


def test_a_run_on_a_miniature_of_cifar_10(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        data = rng.integers(0, 256, (50, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [k % 10 for k in range(50)]}, 2))
    names = [f"class {label}" for label in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, 2))
    given = {"model": "msdnet-cifar10", "method": "adversarial", "attack": "average", "epochs": 1, "steps": 1}
    result = train_model(data="cifar10", given=given, data_dir=tmp_path, out=tmp_path / "run", threads=1)
    assert result.finished
    assert len(result.records[0]["selection"]["attacked"]) == 3
