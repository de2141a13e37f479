"""Every check passes where an evaluation is sound, and fails where it is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mexit.data import digits, splits
from mexit.evaluate import sanity_checks
from mexit.models import MultiExit, build_model, model_spec

torch.set_num_threads(1)


@pytest.fixture
def model() -> MultiExit:
    torch.manual_seed(0)
    return build_model("digits-cnn", 10).eval()


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    data = digits.load()
    index = splits.split(data).part("selection")[:24]
    return torch.from_numpy(data.batch(index, model_spec("digits-cnn").input)), torch.from_numpy(
        data.labels[index]
    )


class Shaken(nn.Module):
    """A defence by randomness."""

    def forward(self, images: Tensor) -> Tensor:
        return images + 0.05 * torch.randn_like(images)


class Levels(nn.Module):
    """A defence by rounding."""

    def forward(self, images: Tensor) -> Tensor:
        return (images * 4).round() / 4


def test_random_answers_are_noticed(model, batch) -> None:
    assert sanity_checks.deterministic(model, batch[0]).passed
    model.normalise = Shaken()
    assert not sanity_checks.deterministic(model, batch[0]).passed


def test_missing_gradients_are_counted(model, batch) -> None:
    images, labels = batch
    assert sanity_checks.gradients_present(model, images, labels).passed
    assert all(parameter.grad is None for parameter in model.parameters())
    model.normalise = Levels()
    found = sanity_checks.gradients_present(model, images, labels)
    assert not found.passed
    assert found.found == f"{3 * len(images)} of {3 * len(images)} are 0"


def test_one_exit_without_gradient_is_enough(model, batch) -> None:
    head = model.stages[1].head
    model.stages[1].head = nn.Sequential(head, Levels())
    assert sanity_checks.gradients_present(model, *batch).found == f"{len(batch[0])} of {3 * len(batch[0])} are 0"


def shares(*values: float, n: int = 100) -> np.ndarray:
    """Right answers (E, n) with these shares."""
    return np.stack([np.arange(n) < value * n for value in values])


def test_noise_that_beats_the_attack_at_one_exit_is_noticed() -> None:
    assert sanity_checks.noise_is_weaker(shares(0.9, 0.9), shares(0.5, 0.9)).passed
    assert not sanity_checks.noise_is_weaker(shares(0.9, 0.4), shares(0.5, 0.5)).passed


def test_accuracy_that_rises_with_the_radius_is_noticed() -> None:
    assert sanity_checks.falls_with_eps({0.2: (0.5, 0.4), 0.1: (0.9, 0.8)}).passed
    assert sanity_checks.falls_with_eps({0.1: (0.9, 0.8), 0.2: (0.905, 0.8)}).passed, "noise of half a point"
    assert not sanity_checks.falls_with_eps({0.1: (0.9, 0.4), 0.2: (0.5, 0.5)}).passed


def test_a_radius_that_should_break_everything_has_to() -> None:
    assert sanity_checks.large_eps_breaks((0.0, 0.1), 0.5, 100, 10).passed
    assert sanity_checks.large_eps_breaks((0.0, 0.15), 0.5, 100, 10).passed, "within two standard errors of chance"
    assert not sanity_checks.large_eps_breaks((0.0, 0.17), 0.5, 100, 10).passed
    assert not sanity_checks.large_eps_breaks((0.0, 0.15), 0.5, 10_000, 10).passed


def test_an_attack_that_was_stopped_early_is_noticed() -> None:
    assert sanity_checks.converged((0.5, 0.6), (0.495, 0.6)).passed
    assert not sanity_checks.converged((0.5, 0.6), (0.5, 0.55)).passed


def test_a_black_box_may_find_next_to_nothing_of_its_own() -> None:
    robust_under = np.arange(1000) < 600
    some, one = robust_under.copy(), robust_under.copy()
    some[:3], one[:2] = False, False
    assert sanity_checks.black_box_is_weaker(one, robust_under, "low").passed
    assert not sanity_checks.black_box_is_weaker(some, robust_under, "low").passed
    assert sanity_checks.black_box_is_weaker(np.ones(1000, bool), robust_under, "low").passed


def test_a_worst_case_that_is_not_the_worst_is_noticed() -> None:
    singles = {"average": 0.5, "route": 0.3}
    assert sanity_checks.worst_is_worst(0.3, singles, "low").passed
    found = sanity_checks.worst_is_worst(0.31, singles, "low")
    assert not found.passed
    assert "route" in found.found


def test_autoattack_that_is_weaker_than_pgd_is_noticed() -> None:
    assert sanity_checks.stronger_than_pgd(0.4, 0.5, "exit 1").passed
    assert not sanity_checks.stronger_than_pgd(0.6, 0.5, "exit 1").passed
