"""Signs that an evaluation is too kind, as checks that run.

After N. Carlini et al.: On evaluating adversarial robustness, 2019 (the checklist), and the automatic flags of
AutoAttack. A check that fails says that the accuracy under attack may be too high, not that the network is bad. A
hard choice of exits hides gradients and trips none of AutoAttack's own flags; that is what the attacks in `policy`
are for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mexit.attacks.losses import exit_cross_entropy
from mexit.attacks.multi_exit_attack import frozen
from mexit.models.multi_exit import MultiExit

FORWARD_PASSES = 5
LARGEST_DIFFERENCE = 1e-4
# What AutoAttack allows Square to find that its gradient attacks missed; RayS is granted the same.
BLACK_BOX_SHARE = 0.002
# Changes of accuracy up to this are taken for noise.
SLACK = 0.01


@dataclass(frozen=True)
class Check:
    """One of them.

    Attributes:
        name: what was asked.
        passed: whether the evaluation may be believed on this point.
        found, expected: in words, with numbers.
        means: what it says if it failed.
    """

    name: str
    passed: bool
    found: str
    expected: str
    means: str


def deterministic(model: MultiExit, images: Tensor) -> Check:
    """The same images (B, C, H, W) several times give the same logits."""
    with torch.no_grad():
        passes = torch.stack([model(images) for _ in range(FORWARD_PASSES)])
    difference = float((passes - passes[0]).abs().max())
    return Check(
        "answers do not change from pass to pass",
        difference <= LARGEST_DIFFERENCE,
        f"largest difference of {FORWARD_PASSES} passes {difference:.1e}",
        f"at most {LARGEST_DIFFERENCE:.0e}",
        "randomness hides the gradient: attack the mean over many draws",
    )


def gradients_present(model: MultiExit, images: Tensor, labels: Tensor) -> Check:
    """At no exit and for no image (B, C, H, W) with label (B,) is the gradient of the loss exactly 0."""
    missing = 0
    with frozen(model, train_mode=False):
        for k in range(1, model.exits + 1):
            moving = images.clone().requires_grad_()
            loss = exit_cross_entropy(model.forward_exit(moving, k).unsqueeze(0), labels)
            (gradient,) = torch.autograd.grad(loss.sum(), moving)
            missing += int((gradient.flatten(1).abs().sum(dim=1) == 0).sum())
    return Check(
        "every image has a gradient at every exit",
        missing == 0,
        f"{missing} of {model.exits * len(images)} are 0",
        "none",
        "cross-entropy cannot climb there: look at attacks on margins (policy, autoattack)",
    )


def noise_is_weaker(noise: NDArray[np.bool_], attacked: NDArray[np.bool_]) -> Check:
    """Right answers (E, N) under random noise and under the attack of the same size."""
    by_noise, by_attack = noise.mean(axis=1), attacked.mean(axis=1)
    return Check(
        "random noise is weaker than the attack",
        bool((by_noise + SLACK >= by_attack).all()),
        f"accuracy per exit {_percents(by_noise)} under noise, {_percents(by_attack)} under the attack",
        "noise leaves at least as many right",
        "the attack does not follow a useful gradient",
    )


def falls_with_eps(curve: Mapping[float, Sequence[float]]) -> Check:
    """Accuracy per exit at each radius."""
    rows = np.asarray([curve[eps] for eps in sorted(curve)])
    rise = float(np.diff(rows, axis=0).max(initial=0.0))
    return Check(
        "a larger radius never helps the network",
        rise <= SLACK,
        f"largest rise of accuracy from one radius to the next {100 * rise:.1f} points",
        f"at most {100 * SLACK:.0f}",
        "the attack fails at large radii, so probably at small ones as well",
    )


def large_eps_breaks(accuracy: Sequence[float], eps: float, n: int, classes: int) -> Check:
    """Accuracy per exit at a radius at which every image can be turned into any other, or into flat grey."""
    chance = 1 / classes
    bound = chance + 2 * float(np.sqrt(chance * (1 - chance) / n))
    return Check(
        f"a radius of {eps:g} breaks everything",
        max(accuracy) <= bound,
        f"accuracy per exit {_percents(np.asarray(accuracy))}",
        f"at most {100 * bound:.1f}%, which is chance and two standard errors",
        "something other than robustness keeps the attack from succeeding: masked gradients, most likely",
    )


def converged(accuracy: Sequence[float], doubled: Sequence[float]) -> Check:
    """Accuracy per exit, and with twice the steps."""
    fall = float(np.max(np.asarray(accuracy) - np.asarray(doubled)))
    return Check(
        "twice the steps find little more",
        fall <= SLACK,
        f"accuracy falls by up to {100 * fall:.1f} points",
        f"at most {100 * SLACK:.0f}",
        "the attack was stopped too early: more --steps",
    )


def black_box_is_weaker(by_it: NDArray[np.bool_], by_others: NDArray[np.bool_], where: str) -> Check:
    """Right answers (N,) under an attack without gradients, and whether they stand against every one with them."""
    only = int((by_others & ~by_it).sum())
    return Check(
        f"a black box breaks nothing that gradients did not: {where}",
        only <= BLACK_BOX_SHARE * len(by_others),
        f"{only} of {len(by_others)} broken by it alone",
        f"at most {100 * BLACK_BOX_SHARE:.1f}%",
        "gradients are hidden there: more steps, more restarts, or an attack made for this network",
    )


def worst_is_worst(worst: float, singles: Mapping[str, float], where: str) -> Check:
    """The accuracy under the worst case of all attacks is not above that under any of them."""
    weakest = min(singles, key=lambda name: singles[name])
    return Check(
        f"the worst case is no better than any single attack: {where}",
        worst <= singles[weakest] + 1e-12,
        f"{100 * worst:.1f}% against {100 * singles[weakest]:.1f}% under {weakest}",
        "at most that",
        "the report contradicts itself",
    )


def stronger_than_pgd(autoattack: float, pgd: float, where: str) -> Check:
    """Accuracy under AutoAttack and under PGD on the same samples."""
    return Check(
        f"AutoAttack is no weaker than PGD: {where}",
        autoattack <= pgd + SLACK,
        f"{100 * autoattack:.1f}% against {100 * pgd:.1f}%",
        "at most that",
        "AutoAttack was stopped short or could not follow the gradient",
    )


def _percents(values: NDArray[np.floating]) -> str:
    return " / ".join(f"{100 * value:.1f}%" for value in values)
