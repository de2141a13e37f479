"""Attacks through the gates, on a trained network and the policies of its bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gated
import numpy as np
import pytest
import torch
from gated import EPS

from mexit.attacks.policy_attacks import (
    GATE_SLACK,
    GATE_WEIGHT,
    AttackSearch,
    AttackTarget,
    route_attack,
    route_loss,
    soft_attack,
    wrong,
)
from mexit.attacks.soft_policy import ExitScores, SoftPolicy, decide
from mexit.core.policy import Policy
from mexit.core.scores import MEASURES
from mexit.train.validation import noisy, run_exits

torch.set_num_threads(1)
ATTACKS = {"route": lambda victim: route_attack(victim, targets=2), "soft": soft_attack}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


@pytest.fixture(scope="module")
def victim(workspace: Path) -> AttackTarget:
    return gated.victim(workspace)


def answered_wrongly(victim: AttackTarget, images: torch.Tensor) -> np.ndarray:
    decision = decide(victim.gates.policy, run_exits(victim.model, images.numpy()))
    return decision.classes != victim.labels.numpy()


@each_attack
@pytest.mark.parametrize("measure", MEASURES)
def test_what_is_found_is_allowed_and_real_and_more_than_noise_finds(workspace, attack, measure) -> None:
    victim = gated.victim(workspace, measure)
    hunt = attack(victim)
    assert (hunt.images - victim.images).abs().max() <= EPS + 1e-6
    assert hunt.images.min() >= 0
    assert hunt.images.max() <= 1
    broken = answered_wrongly(victim, hunt.images)
    np.testing.assert_array_equal(broken, hunt.damage == 1)
    noise = noisy(victim.images.numpy(), victim.index.numpy(), victim.steps)
    assert broken.sum() > answered_wrongly(victim, torch.from_numpy(noise)).sum()


@each_attack
def test_what_stands_is_as_it_was_and_what_was_wrong_before_is_left_alone(victim, attack) -> None:
    hunt = attack(victim)
    before = answered_wrongly(victim, victim.images)
    assert before.any()
    untouched = torch.from_numpy(before | (hunt.damage == 0))
    assert torch.equal(hunt.images[untouched], victim.images[untouched])
    least = len(before) + (~before).sum() * (victim.steps.count + 1)
    assert hunt.passes >= least, "the first climb left samples out"
    climbs = 6 if attack is ATTACKS["route"] else 3
    assert hunt.passes < least + (climbs - 1) * (~before).sum() * (victim.steps.count + 1), (
        "broken ones were climbed"
    )


def test_the_route_decides_where_the_wrong_answer_is_given(victim) -> None:
    """With a gate shut the attack has to go on, and it does; with it wide open it has to stay."""
    policy = victim.gates.policy
    for thresholds, only in (((None, None), 3), ((None, -1e9), 2), ((-1e9, None), 1)):
        changed = replace(victim, gates=replace(victim.gates, policy=replace(policy, thresholds=thresholds)))
        hunt = route_attack(changed, targets=2)
        decision = decide(changed.gates.policy, run_exits(victim.model, hunt.images.numpy()))
        assert (hunt.damage == 1).any()
        assert set(decision.exits[hunt.damage == 1]) == {only}


def test_the_loss_of_a_route_is_the_margin_less_what_bars_the_way() -> None:
    gates = SoftPolicy(Policy("max-probability", False, (1.0, 1.0, 1.0), (4.0, 4.0)), (2.0, 0.5))
    log_answers = torch.zeros(3, 1, 5, dtype=torch.float64)
    log_answers[1, 0, 2] = 0.7
    target = torch.tensor([2])

    def loss(first: float, second: float, j: int) -> float:
        scores = torch.tensor([[first], [second], [9.0]], dtype=torch.float64)
        judged = ExitScores(log_answers, scores)
        return float(route_loss(gates, j, target)(log_answers, judged))

    free, slack = 0.7, GATE_SLACK
    assert loss(3.0, 5.0, 1) == pytest.approx(free), "exit 1 is shut and exit 2 open: nothing bars the way"
    assert loss(5.0, 5.0, 1) == pytest.approx(free - GATE_WEIGHT * (0.5 + slack)), "exit 1 must be shut"
    assert loss(3.0, 3.75, 1) == pytest.approx(free - GATE_WEIGHT * (0.5 + slack)), "exit 2 must be open"
    assert loss(5.0, 3.0, 2) == pytest.approx(-GATE_WEIGHT * (0.5 + slack)), "the last exit has no gate of its own"
    assert loss(5.0, 5.0, 0) == pytest.approx(0.0), "behind the exit that answers no gate matters"


def test_a_hunt_keeps_what_was_once_found(victim) -> None:
    """A climb that ends on an image that is right again has not lost the one on the way that was wrong."""
    hunt = AttackSearch(victim, wrong, enough=1)
    there_and_back = iter([1.0] * 4 + [-1.0] * 5)

    def loss(logits, judged):
        return next(there_and_back) * torch.nn.functional.cross_entropy(
            logits.mean(dim=0), victim.labels, reduction="none"
        )

    hunt.climb("there and back", loss, np.arange(len(victim.labels)))
    last = AttackSearch(replace(victim, images=hunt.images), wrong, enough=1)
    np.testing.assert_array_equal(hunt.damage, last.damage)
    assert hunt.damage.sum() > AttackSearch(victim, wrong, enough=1).damage.sum()


def test_a_random_start_outside_the_pixel_range_is_no_image(victim) -> None:
    """Harm of the clean images, of the start and of the end; the start would win."""
    harms = iter([0, 2, 1])
    one_step = replace(victim, steps=replace(victim.steps, count=1))
    hunt = AttackSearch(one_step, lambda _, labels: np.full(len(labels), next(harms)), enough=9)
    hunt.climb("start", lambda logits, _: logits.sum(dim=(0, 2)), np.arange(len(victim.labels)))
    assert hunt.images.min() >= 0
    assert hunt.images.max() <= 1
    assert (hunt.damage == 1).all()
