"""The fast schedule equals a plain training loop, written out here with nothing but torch and the random numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mexit.attacks.rng import CounterRNG
from mexit.data import digits, splits
from mexit.data.dataset import DataSet
from mexit.data.splits import Splits
from mexit.models import MultiExit, build_model, model_spec
from mexit.train.augment import augment
from mexit.train.config import TrainSettings, resolve
from mexit.train.precision import select_precision
from mexit.train.trainer import Trainer

# Everything that the preset `fast` names, with fewer and smaller batches.
SETTINGS = resolve("cifar10", "fast", {"precision": "fp32", "batch": 40, "epochs": 3, "steps": 4, "fraction": 0.1})


def _plain_loop(settings: TrainSettings, data: DataSet, parts: Splits) -> dict[str, Tensor]:
    """Train by the recipe; returns the averaged weights."""
    torch.manual_seed(settings.seed)
    model, index = build_model(settings.model, 10), parts.part("train")
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    velocity = {parameter: torch.zeros_like(parameter) for parameter in model.parameters()}
    average: dict[str, Tensor] = {}
    per_epoch = -(-len(index) // settings.batch)
    step, total = 0, per_epoch * settings.epochs
    for epoch in range(settings.epochs):
        rng = CounterRNG(settings.seed, epoch)
        order = index[rng.permutation(len(index))]
        for start in range(0, len(order), settings.batch):
            rows = order[start : start + settings.batch]
            positions = torch.from_numpy(rows)
            loaded = torch.from_numpy(data.batch(rows, model_spec(settings.model).input))
            images, labels = augment(loaded, settings.augment, rng, positions), torch.from_numpy(data.labels[rows])
            attacked = _attack(model.eval(), images, labels, positions, rng, settings, step / total)
            model.train()
            loss = torch.zeros(())
            for pixels, weight in ((images, 0.5), (attacked, 1.0)):
                for logits in model(pixels):
                    loss = loss + weight * F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
            model.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            rate = settings.lr * min(step / total / 0.15, (1 - step / total) / 0.85)
            with torch.no_grad():
                for parameter in [*decayed, *others]:
                    assert parameter.grad is not None
                    gradient = parameter.grad + (5e-4 * parameter if parameter.ndim > 1 else 0)
                    velocity[parameter] = 0.9 * velocity[parameter] + gradient
                    parameter -= rate * (gradient + 0.9 * velocity[parameter])
                decay = min(0.998, (1 + step) / (10 + step))
                for name, value in model.state_dict().items():
                    before = average.get(name, value)
                    mixed = decay * before + (1 - decay) * value if value.is_floating_point() else value
                    average[name] = mixed.clone()
            step += 1
    return average


def _attack(
    model: MultiExit,
    images: Tensor,
    labels: Tensor,
    positions: Tensor,
    rng: CounterRNG,
    settings: TrainSettings,
    progress: float,
) -> Tensor:
    """PGD by progress: 3 large steps, then all steps, on the mean loss of the exits; then the worst of all exits."""
    eps, step, steps = settings.eps, settings.step, settings.steps
    if progress < 0.15:
        step, steps = eps / 2, 3
    if progress < 0.6:
        return _pgd(
            model, images, labels, rng.uniform("start average 0", positions, images.shape[1:]), eps, step, steps
        )
    results = [
        _pgd(model, images, labels, rng.uniform(f"start single {k}", positions, images.shape[1:]), eps, step, steps, k)
        for k in range(1, model.exits + 1)
    ]
    with torch.no_grad():
        losses = torch.stack([_losses(model(attacked), labels).mean(0) for attacked in results])
    return torch.stack(results)[losses.argmax(0), torch.arange(len(labels))]


def _pgd(
    model: MultiExit, images: Tensor, labels: Tensor, noise: Tensor, eps: float, step: float, steps: int, k: int = 0
) -> Tensor:
    attacked = images + (2 * noise - 1) * eps
    for _ in range(steps):
        attacked = attacked.detach().requires_grad_()
        losses = _losses(model(attacked), labels)
        (gradient,) = torch.autograd.grad((losses[k - 1] if k else losses.mean(0)).sum(), attacked)
        moved = attacked.detach() + step * gradient.sign()
        attacked = torch.minimum(torch.maximum(moved, images - eps), images + eps).clamp(0, 1)
    return attacked.detach()


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every exit and sample, (E, B)."""
    return torch.stack([F.cross_entropy(one, labels, reduction="none") for one in logits])


def test_the_fast_schedule_equals_a_plain_loop(tmp_path: Path) -> None:
    # A small rate: a step of the attack follows a sign, which enlarges differences of one rounding.
    given = {
        "data": "digits",
        "model": "digits-cnn",
        "method": "adversarial",
        "options": {"clean_weight": 0.5},
        "lr": 0.002,
    }
    given |= {"recompute_norms": 0, "eps": 0.1, "step": 0.02, "precision": "fp32"}
    settings = TrainSettings(**({name: getattr(SETTINGS, name) for name in SETTINGS.to_json()} | given))
    data = digits.load()
    parts = splits.split(data).thinned(data, settings.fraction, None)
    trainer = Trainer(tmp_path, settings, data, parts, select_precision("fp32", "cpu"))
    assert trainer.train()
    assert trainer.ema is not None
    expected = _plain_loop(settings, data, parts)
    torch.manual_seed(settings.seed)
    initial = build_model(settings.model, 10).state_dict()
    for name, value in trainer.ema.weights.items():
        if value.is_floating_point():
            moved = float((expected[name] - initial[name]).norm())
            assert float((value - expected[name]).norm()) <= 0.05 * moved, name


def test_the_preset_names_every_part_of_the_schedule() -> None:
    expected = {
        "model": "wide-cnn", "method": "neo-kd", "lr_schedule": "one-cycle", "warmup": 0.15, "nesterov": True,
        "decay_norms": False, "label_smoothing": 0.1, "ema": 0.998, "augment": "reflect-crop-flip", "momentum": 0.9,
        "short_attack_until": 0.15, "average_attack_until": 0.6, "attack": "max-average", "weight_decay": 5e-4,
    }  # fmt: skip
    stored = SETTINGS.to_json()
    assert {name: stored[name] for name in expected} == expected
    assert np.isclose(SETTINGS.eps, 8 / 255)
