"""Validation and evaluation on a CUDA device give the images and accuracies of the CPU. Skipped without one.

    python -m pytest tests/gpu/test_evaluate_on_gpu.py -rs

CPU and CUDA add in another order, so a few pixels take another sign of the gradient and a few samples another class.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from mexit.attacks.pgd import Attack, PGDConfig
from mexit.data import digits, splits
from mexit.evaluate.config import EvaluateOptions
from mexit.flows.evaluate import evaluate_model
from mexit.flows.train import TrainOptions, train_model
from mexit.models import MultiExit, model_spec
from mexit.models.device import exact_float32
from mexit.train import checkpoint
from mexit.train.validation import attack_images, correct_predictions, run_exits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")

SAMPLES = 128
FEW = 4 / SAMPLES  # share of samples that may take another class
TF32_BITS = 2.0**-10


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that was trained on the GPU, against a weak attack: some samples are robust and some are not."""
    out = Path(tmp_path_factory.mktemp("gpu") / "digits")
    settings = {"method": "adversarial", "epochs": 6, "steps": 2, "step": 0.08}
    train_model(settings=settings, out=out, options=TrainOptions(device="cuda"))
    return out


@pytest.fixture
def on_both(run: Path) -> tuple[MultiExit, MultiExit]:
    """The network on the CPU and on the GPU."""
    return checkpoint.load_model(run)[0], checkpoint.load_model(run)[0].to("cuda")


@pytest.fixture(scope="module")
def samples() -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Images (N, 1, 8, 8), labels and positions of test images."""
    data = digits.load()
    index = splits.split(data).part("test")[:SAMPLES]
    return data.batch(index, model_spec("digits-cnn").input), data.labels[index], index


def test_without_tf32_a_convolution_has_the_precision_of_float32() -> None:
    torch.manual_seed(0)
    images, layer = torch.randn(32, 64, 32, 32, device="cuda"), nn.Conv2d(64, 64, 3, padding=1).to("cuda")
    with torch.no_grad():
        by_default = layer(images)
        with exact_float32():
            exact = layer(images)
        reference = layer.double()(images.double())
    default_error, error = (float((one - reference).abs().max() / reference.abs().max()) for one in (by_default, exact))
    assert error < TF32_BITS / 30
    assert default_error > 3 * error, "this device has no TF32 by default: the test shows nothing"


@pytest.mark.parametrize("target_exits", ["average", "max-average"])
def test_attacked_images_and_accuracies_are_those_of_the_cpu(
    on_both: tuple[MultiExit, MultiExit],
    samples: tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]],
    target_exits: str,
) -> None:
    images, labels, index = samples
    for steps, different in ((2, 0.02), (20, 1.0)):
        attack = Attack(target_exits, PGDConfig(0.1, 0.025, steps))
        attacked = [attack_images(model, images, labels, index, attack) for model in on_both]
        changed = np.abs(attacked[0] - attacked[1]).reshape(SAMPLES, -1) > 1e-4
        assert changed.mean() <= different, "another random start or another loss"
        correct = [
            correct_predictions(run_exits(model, one), labels) for model, one in zip(on_both, attacked, strict=True)
        ]
        accuracy = [one.mean(axis=1) for one in correct]
        assert np.abs(accuracy[0] - accuracy[1]).max() <= FEW


def test_logits_are_those_of_the_cpu(
    on_both: tuple[MultiExit, MultiExit], samples: tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]
) -> None:
    cpu, cuda = (run_exits(model, samples[0]) for model in on_both)
    assert np.abs(cpu - cuda).max() <= 1e-5 * np.abs(cpu).max()


def test_validation_on_the_gpu_gives_the_accuracy_of_the_network_on_the_cpu(run: Path) -> None:
    model, settings, parts = checkpoint.load_model(run)
    data, index = digits.load(), parts.part("selection")
    images, labels = data.batch(index, settings.model_spec().input), data.labels[index]
    attack = settings.test_attack("average", steps=settings.selection_steps)
    attacked = attack_images(model, images, labels, index, attack, seed=settings.seed)
    logged = json.loads((run / checkpoint.LOG).read_text().splitlines()[-1])["selection"]
    for name, pixels in (("clean", images), ("attacked", attacked)):
        accuracy = correct_predictions(run_exits(model, pixels), labels).mean(axis=1)
        assert np.abs(accuracy - logged[name]).max() <= 3 / len(index)


def test_a_report_of_the_gpu_equals_one_of_the_cpu(run: Path) -> None:
    pytest.importorskip("pyautoattack")
    """Every group of attacks, on the exits of a run and on the policy of a budget; the run itself is the transfer's."""
    reports: list[dict[str, Any]] = []
    for device in ("cpu", "cuda"):
        options = EvaluateOptions(
            ("pgd", "policy", "autoattack", "slowdown", "sanity"),
            exits=(3,),
            strong_samples=32,
            targets=1,
            queries=20,
            autoattack_steps=3,
            transfer=run,
            budgets=("medium",),
            device=device,
            batch=SAMPLES,  # AutoAttack's random numbers depend on it
        )
        reports.append(dict(evaluate_model(run, samples=SAMPLES, steps=5, options=options).report))
    cpu, cuda = reports
    assert cpu["settings"]["device"] == "cpu"
    assert cuda["settings"]["device"] == f"cuda ({torch.cuda.get_device_name()})"
    assert {name: row["n"] for name, row in entries(cuda).items()} == {
        name: row["n"] for name, row in entries(cpu).items()
    }
    for name, row in entries(cpu).items():
        assert abs(entries(cuda)[name]["value"] - row["value"]) <= 4 / row["n"], name
    assert entries(cuda)["exit 3 autoattack"]["value"] < entries(cuda)["exit 3 clean"]["value"], (
        "the attack did nothing"
    )
    assert [check["name"] for check in cuda["checks"]] == [check["name"] for check in cpu["checks"]]


def entries(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The accuracies of a report by exit or budget and condition."""
    rows = {f"exit {row['exit']}": row for row in report["exits"]} | report["budgets"]
    return {
        f"{row_name} {condition}": entry
        for row_name, row in rows.items()
        for condition, entry in row.items()
        if isinstance(entry, dict)
    }
