"""The heads of a frozen network: logistic regressions at their optimum, and nothing else of the network changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mexit.core.progress import Silent
from mexit.data import digits, splits
from mexit.models import MultiExit, model_spec
from mexit.train.config import TrainSettings
from mexit.train.feature_cache import compute_features
from mexit.train.frozen_heads import PENALTIES, fit_regression, train_heads

SETTINGS = TrainSettings(freeze=True, epochs=0, attack="none", method="skd")


def random_features(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of four overlapping classes, each of another scale and offset; one of them is constant."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))
    features = centres[labels] + torch.randn(count, 6, generator=generator)
    features = features * torch.tensor([1e-3, 1, 30, 1, 5, 0]) + torch.tensor([0, 100.0, -3, 0, 0, 4])
    return features, labels


def reference(features: Tensor, labels: Tensor, penalty: float, steps: int) -> Callable[[Tensor], Tensor]:
    """The same regression by plain gradient descent in float64: features (N, D) to logits (N, C)."""
    std, mean = torch.std_mean(features.double(), dim=0, correction=0)
    std = std.where(std > 0, torch.ones_like(std))
    values = (features - mean) / std
    weight = torch.zeros(int(labels.max()) + 1, values.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(weight), dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        loss = F.cross_entropy(F.linear(values, weight, bias), labels) + penalty / 2 * weight.square().sum()
        for parameter, gradient in zip((weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True):
            parameter.data -= gradient / 4
    return lambda other: F.linear((other - mean) / std, weight, bias).detach()


def test_a_regression_is_the_optimum_for_its_penalty() -> None:
    features, labels = random_features(400)
    fitted = fit_regression(features, labels, *random_features(400, seed=1), classes=4)
    expected = reference(features, labels, fitted.penalty, steps=3000)(features)
    torch.testing.assert_close(fitted.logits(features).double(), expected, atol=5e-3, rtol=0)


def test_the_penalty_suits_the_held_out_images() -> None:
    """Many features and few images need a stronger penalty than few features and many images."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 2
    noise = torch.randn(80, 300, generator=generator)
    noise[:, 0] += 2.0 * labels
    few = fit_regression(noise[:40], labels[:40], noise[40:], labels[40:], classes=2)
    many = fit_regression(*random_features(2000), *random_features(400, seed=1), classes=4)
    assert few.penalty > many.penalty
    assert {few.penalty, many.penalty} <= set(PENALTIES)


def test_heads_of_random_features_classify_digits_and_the_rest_stays() -> None:
    torch.manual_seed(0)
    network = model_spec("digits-cnn").build(10)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    data = digits.load()
    parts = splits.split(data)
    accuracy = train_heads(network, SETTINGS, data, parts, 0, Silent())
    assert accuracy is not None
    assert min(accuracy) > 0.8
    assert measured(network, "selection") == pytest.approx(accuracy, abs=1e-6)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {f"stages.{k}.head.4.{name}" for k in range(3) for name in ("weight", "bias")}


def measured(network: MultiExit, part: str) -> list[float]:
    """Accuracy of every exit on a split, in a pass of its own."""
    data = digits.load()
    index = splits.split(data).part(part)
    images = torch.from_numpy(data.batch(index, model_spec("digits-cnn").input))
    with torch.no_grad():
        answers = network.eval()(images).argmax(dim=-1).numpy()
    return [float(value) for value in (answers == data.labels[index]).mean(axis=1)]


def test_the_last_exit_is_within_a_point_of_a_regression_on_the_same_features() -> None:
    """The reference is fitted for every penalty, and the best one on the test split is taken."""
    torch.manual_seed(0)
    network = model_spec("digits-cnn").build(10)
    data = digits.load()
    parts = splits.split(data)
    spec = model_spec("digits-cnn").input
    train, test = (
        compute_features(network, [data.batch(parts.part(name), spec)], data.labels[parts.part(name)])
        for name in ("train", "test")
    )
    train_heads(network, SETTINGS, data, parts, 0, Silent())
    fits = [reference(train.exits[-1], train.labels, penalty, steps=300) for penalty in (1e-2, 1e-3, 1e-4)]
    best = max(float((fit(test.exits[-1]).argmax(dim=1) == test.labels).float().mean()) for fit in fits)
    assert measured(network, "test")[-1] >= best - 0.01
