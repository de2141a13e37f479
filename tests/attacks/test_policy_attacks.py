"""Attacks on a policy with known thresholds, on a trained network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from policy_target import EPS, attack_target, noisy_images, run_exits

from mexit.attacks.policy_attacks import (
    THRESHOLD_SLACK,
    THRESHOLD_WEIGHT,
    AttackSearch,
    AttackTarget,
    misclassified,
    route_attack,
    route_loss,
    soft_attack,
)
from mexit.attacks.soft_policy import SoftPolicy, decide
from mexit.core.exit_policy import Policy
from mexit.core.scores import MEASURES
from mexit.models.scores_torch import ExitScores

torch.set_num_threads(1)
ATTACKS = {"route": lambda target: route_attack(target, classes=2), "soft": soft_attack}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


@pytest.fixture(scope="module")
def target(workspace: Path) -> AttackTarget:
    return attack_target(workspace)


def wrong_predictions(target: AttackTarget, images: torch.Tensor) -> np.ndarray:
    decision = decide(target.policy.policy, run_exits(target, images))
    return decision.classes != target.labels.numpy()


@pytest.mark.slow
@each_attack
@pytest.mark.parametrize("measure", MEASURES)
def test_images_are_valid_damage_is_real_and_exceeds_that_of_noise(workspace, attack, measure) -> None:
    target = attack_target(workspace, measure)
    search = attack(target)
    assert (search.images - target.images).abs().max() <= EPS + 1e-6
    assert search.images.min() >= 0
    assert search.images.max() <= 1
    wrong = wrong_predictions(target, search.images)
    np.testing.assert_array_equal(wrong, search.damage == 1)
    assert wrong.sum() > wrong_predictions(target, noisy_images(target)).sum()


@pytest.mark.slow
@each_attack
def test_robust_and_already_wrong_samples_stay_unchanged(target, attack) -> None:
    search = attack(target)
    before = wrong_predictions(target, target.images)
    assert before.any()
    unchanged = torch.from_numpy(before | (search.damage == 0))
    assert torch.equal(search.images[unchanged], target.images[unchanged])
    one_run = (~before).sum() * (target.pgd.steps + 1)
    assert search.passes >= len(before) + one_run, "the first run left out samples"
    runs = 6 if attack is ATTACKS["route"] else 3
    assert search.passes < len(before) + runs * one_run, "damaged samples were attacked again"


@pytest.mark.slow
def test_a_route_follows_the_thresholds(target) -> None:
    """The exit that gives the wrong answer is the only one that the thresholds allow."""
    policy = target.policy.policy
    for thresholds, only in (((None, None), 3), ((None, -1e9), 2), ((-1e9, None), 1)):
        changed = replace(target, policy=replace(target.policy, policy=replace(policy, thresholds=thresholds)))
        search = route_attack(changed, classes=2)
        decision = decide(changed.policy.policy, run_exits(target, search.images))
        assert (search.damage == 1).any()
        assert set(decision.exits[search.damage == 1]) == {only}


def test_the_route_loss_is_the_class_margin_minus_the_threshold_penalties() -> None:
    policy = SoftPolicy(Policy("max-probability", False, (1.0, 1.0, 1.0), (4.0, 4.0)), (2.0, 0.5))
    log_probabilities = torch.zeros(3, 1, 5, dtype=torch.float64)
    log_probabilities[1, 0, 2] = 0.7
    classes = torch.tensor([2])

    def loss(first: float, second: float, j: int) -> float:
        scores = torch.tensor([[first], [second], [9.0]], dtype=torch.float64)
        return float(route_loss(policy, j, classes)(log_probabilities, ExitScores(log_probabilities, scores)))

    class_margin, slack = 0.7, THRESHOLD_SLACK
    assert loss(3.0, 5.0, 1) == pytest.approx(class_margin), "exit 1 passes on and exit 2 answers: no penalty"
    penalty = THRESHOLD_WEIGHT * (0.5 + slack)
    assert loss(5.0, 5.0, 1) == pytest.approx(class_margin - penalty), "exit 1 would answer"
    assert loss(3.0, 3.75, 1) == pytest.approx(class_margin - penalty), "exit 2 would not answer"
    assert loss(5.0, 3.0, 2) == pytest.approx(-penalty), "the last exit has no threshold of its own"
    assert loss(5.0, 5.0, 0) == pytest.approx(0.0), "thresholds behind the answering exit do not count"


def test_a_search_keeps_damaging_images_from_the_middle_of_a_run(target) -> None:
    """The loss is maximised for four steps and then minimised, so the run ends near the clean images."""
    search = AttackSearch(target, misclassified, enough=1)
    signs = iter([1.0] * 4 + [-1.0] * 5)

    def loss_fn(logits, _):
        return next(signs) * torch.nn.functional.cross_entropy(logits.mean(dim=0), target.labels, reduction="none")

    search.run("there and back", loss_fn, np.arange(len(target.labels)))
    evaluated = AttackSearch(replace(target, images=search.images), misclassified, enough=1)
    np.testing.assert_array_equal(search.damage, evaluated.damage)
    assert search.damage.sum() > AttackSearch(target, misclassified, enough=1).damage.sum()


def test_a_random_start_outside_the_pixel_range_is_not_kept(target) -> None:
    """Damage of the clean images, of the start and of the end: the start would be the worst."""
    damage = iter([0, 2, 1])
    one_step = replace(target, pgd=replace(target.pgd, steps=1))
    search = AttackSearch(one_step, lambda _, labels: np.full(len(labels), next(damage)), enough=9)
    search.run("start", lambda logits, _: logits.sum(dim=(0, 2)), np.arange(len(target.labels)))
    assert search.images.min() >= 0
    assert search.images.max() <= 1
    assert (search.damage == 1).all()
