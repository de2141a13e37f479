"""Training on a CUDA device: a step with CUDA graphs equals a step without. Skipped without a CUDA device."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mexit.attacks.pgd import Attack, PGDConfig, attack_noise, run_attack
from mexit.attacks.rng import CounterRNG
from mexit.data import digits, splits
from mexit.models import build_model, model_spec
from mexit.models.device import exact_float32
from mexit.train import checkpoint
from mexit.train.config import TrainSettings
from mexit.train.cuda_graphs import StepGraphs
from mexit.train.device_images import DeviceImages
from mexit.train.methods import METHODS
from mexit.train.precision import select_precision
from mexit.train.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")

# 188 images in batches of 60: three full batches, and one of 8 that runs without graphs.
# Training enlarges differences of one rounding: the attack steps by the sign of the gradient, and a unit of ReLU is on
# or off. So the attack follows the gradient itself, the learning rate hardly changes the weights, and the momentum is
# compared. Weights that differ by one rounding then change it by up to 0.4 %.
TOLERANCE = 0.01
COMMON: dict[str, Any] = {"epochs": 2, "steps": 3, "batch": 60, "fraction": 0.2, "lr": 1e-7, "rule": "raw", "step": 0.5}
# at-aka needs teacher runs; it crafts its images as cat-aka does.
TRAINED = sorted(METHODS.keys() - {"at-aka"})


def _train(folder: Path, graphs: bool, **settings: Any) -> dict[str, Tensor]:
    resolved = TrainSettings(**(COMMON | settings))
    data = digits.load()
    parts = splits.split(data).thinned(data, resolved.fraction, None)
    folder.mkdir(parents=True)
    trainer = Trainer(folder, resolved, data, parts, select_precision(resolved.precision, "cuda"), graphs=graphs)
    assert trainer.train()
    tensors = {f"statistics {name}": value.float().cpu() for name, value in trainer.model.named_buffers()}
    momenta = ((name, trainer.optimiser.state[parameter]) for name, parameter in trainer.model.named_parameters())
    return tensors | {name: state["momentum_buffer"].cpu() for name, state in momenta}


def _largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of a tensor, relative to its norm."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / (1e-6 + one[name].norm())) for name in one)


@pytest.mark.parametrize("method", TRAINED)
def test_graphs_do_not_change_a_method(tmp_path: Path, method: str) -> None:
    settings = {"method": method, "attack": METHODS[method].default_attack, "precision": "fp32", "model": "digits-cnn"}
    with exact_float32():
        plain = _train(tmp_path / "plain", graphs=False, **settings)
        graphed = _train(tmp_path / "graphs", graphs=True, **settings)
    assert _largest_difference(plain, graphed) <= TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [
        {"attack": "max-average", "steps": 4, "short_attack_until": 0.3, "average_attack_until": 0.6},
        {"attack": "single", "restarts": 2},
        {"craft_train_mode": True},
        {"awp": 0.01, "trades": 2.0},
        {"ema": 0.99, "recompute_norms": 60, "decay_norms": False, "nesterov": True, "exit_weights": (2.0, 1.0, 1.0)},
        {"norm": "l2", "eps": 0.5, "step": 0.2, "rule": "sign"},
    ],
    ids=["growing attack", "single", "train mode", "awp and trades", "averages", "l2"],
)
def test_graphs_do_not_change_a_schedule(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"method": "adversarial", "precision": "fp32", "model": "digits-cnn", **settings}
    with exact_float32():
        plain = _train(tmp_path / "plain", graphs=False, **settings)
        graphed = _train(tmp_path / "graphs", graphs=True, **settings)
    assert _largest_difference(plain, graphed) <= TOLERANCE


MODELS = ["wide-cnn", "resnet38", "msdnet-cifar10", "small-cnn"]


@pytest.mark.parametrize("model", MODELS)
def test_graphs_do_not_change_batch_norm_or_dropout(tmp_path: Path, model: str) -> None:
    settings = {"method": "clean", "attack": "none", "precision": "fp32", "model": model, "epochs": 1}
    with exact_float32():
        plain = _train(tmp_path / "plain", graphs=False, **settings)
        graphed = _train(tmp_path / "graphs", graphs=True, **settings)
    assert _largest_difference(plain, graphed) <= TOLERANCE


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("target_exits", ["average", "max-average"])
def test_an_attack_as_a_graph_equals_the_attack(model: str, target_exits: str) -> None:
    network = build_model(model, 10).cuda()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, *network.input_shape, generator=generator).cuda()
    labels = (torch.arange(20) % 10).cuda()
    attack = Attack(target_exits, PGDConfig(0.1, 0.02, 3))
    noise = attack_noise(network.exits, images, attack, rng=CounterRNG(0, 0), index=labels)
    graphs = StepGraphs(network, nullcontext, batch=20)
    with exact_float32():
        plain = run_attack(network, images, labels, attack, noise, nullcontext)
        first = graphs.run_attack(network, images, labels, attack, noise, nullcontext)
        again = graphs.run_attack(network, images.flip(0), labels.flip(0), attack, noise, nullcontext)
    # A pixel whose gradient is nearly zero may step in either direction.
    assert float(((first - plain).abs() > 1e-6).float().mean()) < 0.01
    assert float(((again - first).abs() > 1e-6).float().mean()) > 0.5


def test_training_in_bfloat16_with_graphs_learns(tmp_path: Path) -> None:
    settings = {"method": "neo-kd", "attack": "max-average", "model": "digits-cnn", "precision": "bf16"}
    tensors = _train(tmp_path / "run", True, **settings, **{"epochs": 6, "fraction": 1.0, "lr": 0.03, "rule": "sign"})
    assert all(torch.isfinite(value).all() for value in tensors.values())
    accuracy = json.loads((tmp_path / "run" / checkpoint.LOG).read_text().splitlines()[-1])["selection"]
    assert min(accuracy["clean"]) > 0.6


def test_images_on_the_device_equal_loaded_ones() -> None:
    data = digits.load()
    index = splits.split(data).part("train")
    spec = model_spec("digits-cnn").input
    assert DeviceImages.fit(data, len(index), spec, "cuda")
    resident = DeviceImages(data, index, spec, "cuda")
    chosen = index[::7]
    assert torch.equal(
        resident.batch(torch.from_numpy(chosen).cuda()).cpu(), torch.from_numpy(data.batch(chosen, spec))
    )
