"""Slowdown: the measure by hand, and that the attacks slow a trained network down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gated
import numpy as np
import pytest
import torch
from gated import EPS

from mexit.attacks.policy_attacks import AttackTarget
from mexit.attacks.slowdown import NAMES, efficacy, slow_down
from mexit.attacks.soft_policy import decide
from mexit.train.validation import noisy, run_exits

torch.set_num_threads(1)
COSTS = (20, 50, 100)


def test_efficacy_is_the_area_under_the_curve() -> None:
    half = np.asarray([1, 1, 2, 3])
    # (0, 0) to (0.2, 0.5) to (0.5, 0.75) to (1, 1), by trapezia.
    assert efficacy(half, COSTS) == pytest.approx(0.2 * 0.25 + 0.3 * 0.625 + 0.5 * 0.875)
    assert efficacy(np.asarray([1, 1]), COSTS) == pytest.approx(1 - 0.2 / 2)
    assert efficacy(np.asarray([3, 3]), COSTS) == pytest.approx(0.5 / 2)


def test_efficacy_falls_whenever_somebody_leaves_later() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        exits = rng.integers(1, 4, 30)
        later = np.minimum(exits + (rng.random(30) < 0.3), 3)
        assert (efficacy(later, COSTS) < efficacy(exits, COSTS)) == (later != exits).any()


@pytest.fixture(scope="module")
def victim(workspace: Path) -> AttackTarget:
    return gated.victim(workspace)


def taken(victim: AttackTarget, images: np.ndarray) -> np.ndarray:
    return decide(victim.gates.policy, run_exits(victim.model, images)).exits


@pytest.mark.parametrize("name", NAMES)
def test_inputs_leave_later_than_before_and_than_under_noise(victim, name) -> None:
    hunt = slow_down(victim, name)
    assert (hunt.images - victim.images).abs().max() <= EPS + 1e-6
    exits, before = taken(victim, hunt.images.numpy()), taken(victim, victim.images.numpy())
    np.testing.assert_array_equal(exits, hunt.damage)
    assert (exits >= before).all(), "made somebody faster"
    noise = taken(victim, noisy(victim.images.numpy(), victim.index.numpy(), victim.steps))
    assert efficacy(exits, COSTS) < efficacy(noise, COSTS) - 0.05
    at_the_end = torch.from_numpy(before == 3)
    assert torch.equal(hunt.images[at_the_end], victim.images[at_the_end]), "it cannot get any later"


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_that_never_leaves_early_cannot_be_slowed_down(victim, name) -> None:
    closed = replace(victim, gates=replace(victim.gates, policy=victim.gates.policy.without_early_exit()))
    hunt = slow_down(closed, name)
    assert torch.equal(hunt.images, victim.images)
    assert (hunt.damage == 3).all()


def test_the_two_attacks_differ(victim) -> None:
    sloth, hinge = (slow_down(victim, name) for name in NAMES)
    assert not torch.equal(sloth.images, hinge.images)
