"""Every check passes on a sound evaluation and fails on an unsound one."""

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
    return torch.from_numpy(data.batch(index, model_spec("digits-cnn").input)), torch.from_numpy(data.labels[index])


class AddNoise(nn.Module):
    """A defence by randomness."""

    def forward(self, images: Tensor) -> Tensor:
        return images + 0.05 * torch.randn_like(images)


class Rounding(nn.Module):
    """A defence by rounding."""

    def forward(self, images: Tensor) -> Tensor:
        return (images * 4).round() / 4


def test_random_answers_fail(model, batch) -> None:
    assert sanity_checks.deterministic(model, batch[0]).passed
    model.normalise = AddNoise()
    assert not sanity_checks.deterministic(model, batch[0]).passed


def test_missing_gradients_are_counted(model, batch) -> None:
    images, labels = batch
    assert sanity_checks.gradients_present(model, images, labels).passed
    assert all(parameter.grad is None for parameter in model.parameters())
    model.normalise = Rounding()
    check = sanity_checks.gradients_present(model, images, labels)
    assert not check.passed
    assert check.found == f"{3 * len(images)} of {3 * len(images)} are 0"


def test_one_exit_without_gradient_fails(model, batch) -> None:
    head = model.stages[1].head
    model.stages[1].head = nn.Sequential(head, Rounding())
    assert sanity_checks.gradients_present(model, *batch).found == f"{len(batch[0])} of {3 * len(batch[0])} are 0"


def correct(*accuracies: float, n: int = 100) -> np.ndarray:
    """Correct answers (E, n) with these accuracies."""
    return np.stack([np.arange(n) < value * n for value in accuracies])


def test_noise_stronger_than_the_attack_at_one_exit_fails() -> None:
    assert sanity_checks.noise_is_weaker(correct(0.9, 0.9), correct(0.5, 0.9)).passed
    assert not sanity_checks.noise_is_weaker(correct(0.9, 0.4), correct(0.5, 0.5)).passed


def test_accuracy_that_rises_with_the_radius_fails() -> None:
    assert sanity_checks.accuracy_falls_with_eps({0.2: (0.5, 0.4), 0.1: (0.9, 0.8)}).passed
    assert sanity_checks.accuracy_falls_with_eps({0.1: (0.9, 0.8), 0.2: (0.905, 0.8)}).passed, "noise of half a point"
    assert not sanity_checks.accuracy_falls_with_eps({0.1: (0.9, 0.4), 0.2: (0.5, 0.5)}).passed


def test_a_large_radius_has_to_break_everything() -> None:
    assert sanity_checks.large_eps_breaks_everything((0.0, 0.1), 0.5, 100, 10).passed
    assert sanity_checks.large_eps_breaks_everything((0.0, 0.15), 0.5, 100, 10).passed, (
        "within two standard errors of chance"
    )
    assert not sanity_checks.large_eps_breaks_everything((0.0, 0.17), 0.5, 100, 10).passed
    assert not sanity_checks.large_eps_breaks_everything((0.0, 0.15), 0.5, 10_000, 10).passed


def test_an_attack_that_was_stopped_early_fails() -> None:
    assert sanity_checks.converged((0.5, 0.6), (0.495, 0.6)).passed
    assert not sanity_checks.converged((0.5, 0.6), (0.5, 0.55)).passed


def test_a_black_box_that_breaks_more_than_two_in_a_thousand_alone_fails() -> None:
    gradients = np.arange(1000) < 600
    three_fewer, two_fewer = gradients.copy(), gradients.copy()
    three_fewer[:3], two_fewer[:2] = False, False
    assert sanity_checks.black_box_is_weaker(two_fewer, gradients, "low").passed
    assert not sanity_checks.black_box_is_weaker(three_fewer, gradients, "low").passed
    assert sanity_checks.black_box_is_weaker(np.ones(1000, bool), gradients, "low").passed


def test_a_worst_case_above_a_single_attack_fails() -> None:
    singles = {"average": 0.5, "route": 0.3}
    assert sanity_checks.worst_case_is_lowest(0.3, singles, "low").passed
    check = sanity_checks.worst_case_is_lowest(0.31, singles, "low")
    assert not check.passed
    assert "route" in check.found


def test_autoattack_weaker_than_pgd_fails() -> None:
    assert sanity_checks.autoattack_is_stronger(0.4, 0.5, "exit 1").passed
    assert not sanity_checks.autoattack_is_stronger(0.6, 0.5, "exit 1").passed
