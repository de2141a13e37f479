"""Slowdown attacks: efficacy by hand, and later exits on a trained network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from policy_target import EPS, attack_target, noisy_images, run_exits

from mexit.attacks.policy_attacks import AttackTarget
from mexit.attacks.slowdown import SLOWDOWNS, efficacy, slowdown_attack
from mexit.attacks.soft_policy import decide

torch.set_num_threads(1)
COSTS = (20, 50, 100)


def test_efficacy_is_the_area_under_the_curve() -> None:
    half = np.asarray([1, 1, 2, 3])
    # (0, 0) to (0.2, 0.5) to (0.5, 0.75) to (1, 1), by trapezia.
    assert efficacy(half, COSTS) == pytest.approx(0.2 * 0.25 + 0.3 * 0.625 + 0.5 * 0.875)
    assert efficacy(np.asarray([1, 1]), COSTS) == pytest.approx(1 - 0.2 / 2)
    assert efficacy(np.asarray([3, 3]), COSTS) == pytest.approx(0.5 / 2)


def test_efficacy_falls_if_any_sample_leaves_later() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        exits = rng.integers(1, 4, 30)
        later = np.minimum(exits + (rng.random(30) < 0.3), 3)
        assert (efficacy(later, COSTS) < efficacy(exits, COSTS)) == (later != exits).any()


@pytest.fixture(scope="module")
def target(workspace: Path) -> AttackTarget:
    return attack_target(workspace)


def exits_taken(target: AttackTarget, images: torch.Tensor) -> np.ndarray:
    return decide(target.policy.policy, run_exits(target, images)).exits


@pytest.mark.parametrize("name", SLOWDOWNS)
def test_samples_leave_later_than_clean_ones_and_than_under_noise(target, name) -> None:
    search = slowdown_attack(target, name)
    assert (search.images - target.images).abs().max() <= EPS + 1e-6
    exits, before = exits_taken(target, search.images), exits_taken(target, target.images)
    np.testing.assert_array_equal(exits, search.damage)
    assert (exits >= before).all(), "a sample became faster"
    noise = exits_taken(target, noisy_images(target))
    assert efficacy(exits, COSTS) < efficacy(noise, COSTS) - 0.05
    at_the_end = torch.from_numpy(before == 3)
    assert torch.equal(search.images[at_the_end], target.images[at_the_end]), "it cannot get any later"


@pytest.mark.parametrize("name", SLOWDOWNS)
def test_a_policy_without_early_exits_cannot_be_slowed_down(target, name) -> None:
    policy = replace(target.policy, policy=target.policy.policy.without_early_exit())
    search = slowdown_attack(replace(target, policy=policy), name)
    assert torch.equal(search.images, target.images)
    assert (search.damage == 3).all()


def test_the_two_attacks_differ(target) -> None:
    sloth, hinge = (slowdown_attack(target, name) for name in SLOWDOWNS)
    assert not torch.equal(sloth.images, hinge.images)
