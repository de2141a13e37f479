"""Checks of the evaluation itself: signs that the attacks are too weak.

After the checklist of N. Carlini et al.: On evaluating adversarial robustness, 2019, and the automatic flags of
AutoAttack. A failed check means that the accuracy under attack may be too high, not that the network is bad. The hard
choice of an exit hides gradients and raises none of AutoAttack's flags; the group policy exists for this reason.

The first part of the module holds the checks on plain numbers, the second part applies them to `AttackResults`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mexit.attacks.losses import exit_cross_entropy
from mexit.attacks.pgd import frozen
from mexit.evaluate.results import NOISE, AttackResults, correct_at, robust_under, worst_per_exit
from mexit.evaluate.suites import AttackContext, single_attacks
from mexit.evaluate.target import Labels, Logits
from mexit.models.multi_exit import MultiExit
from mexit.train.validation import correct_predictions

FORWARD_PASSES = 5
LARGEST_DIFFERENCE = 1e-4
# The share of samples that AutoAttack allows Square to break alone; the same holds for RayS here.
BLACK_BOX_SHARE = 0.002
# Changes of accuracy up to this share count as noise.
SLACK = 0.01
CHECK_IMAGES = 64
BLACK_BOX = ("square", "square served", "rays")


@dataclass(frozen=True)
class Check:
    """The outcome of one check, as the report holds it.

    Attributes:
        name: the statement that was checked.
        passed: whether it holds.
        found: what was measured.
        expected: what was expected.
        means: the meaning of a failure.
    """

    name: str
    passed: bool
    found: str
    expected: str
    means: str

    def to_json(self) -> dict[str, Any]:
        """The check as plain JSON values."""
        return {name: np.asarray(value).item() for name, value in vars(self).items()}

    def flag(self) -> str:
        """The failure in one line."""
        return f"{self.name}: {self.found}, expected {self.expected}; {self.means}"


def deterministic(model: MultiExit, images: Tensor) -> Check:
    """Repeated passes of the same images (B, C, H, W) give the same logits."""
    with torch.no_grad():
        passes = torch.stack([model(images) for _ in range(FORWARD_PASSES)])
    difference = float((passes - passes[0]).abs().max())
    return Check(
        "answers do not change from pass to pass",
        difference <= LARGEST_DIFFERENCE,
        f"largest difference of {FORWARD_PASSES} passes {difference:.1e}",
        f"at most {LARGEST_DIFFERENCE:.0e}",
        "randomness hides the gradient: attack the mean over many passes",
    )


def gradients_present(model: MultiExit, images: Tensor, labels: Tensor) -> Check:
    """At every exit the gradient of the loss is nonzero for every image (B, C, H, W) with label (B,)."""
    missing = 0
    with frozen(model, train_mode=False):
        for k in range(1, model.exits + 1):
            pixels = images.clone().requires_grad_()
            loss = exit_cross_entropy(model.forward_exit(pixels, k).unsqueeze(0), labels)
            (gradient,) = torch.autograd.grad(loss.sum(), pixels)
            missing += int((gradient.flatten(1).abs().sum(dim=1) == 0).sum())
    return Check(
        "every image has a gradient at every exit",
        missing == 0,
        f"{missing} of {model.exits * len(images)} are 0",
        "none",
        "attacks on cross-entropy fail there: see the attacks on margins (policy, autoattack)",
    )


def noise_is_weaker(noise: NDArray[np.bool_], attacked: NDArray[np.bool_]) -> Check:
    """Correct answers (E, N) under random noise and under an attack of the same radius."""
    by_noise, by_attack = noise.mean(axis=1), attacked.mean(axis=1)
    return Check(
        "random noise is weaker than the attack",
        bool((by_noise + SLACK >= by_attack).all()),
        f"accuracy per exit {_percents(by_noise)} under noise, {_percents(by_attack)} under the attack",
        "noise leaves at least as many correct",
        "the attack does not follow a useful gradient",
    )


def accuracy_falls_with_eps(curve: Mapping[float, Sequence[float]]) -> Check:
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


def large_eps_breaks_everything(accuracy: Sequence[float], eps: float, n: int, classes: int) -> Check:
    """Accuracy per exit of n samples at a radius that can turn every image into a uniform grey one."""
    chance = 1 / classes
    bound = chance + 2 * float(np.sqrt(chance * (1 - chance) / n))
    return Check(
        f"a radius of {eps:g} breaks everything",
        max(accuracy) <= bound,
        f"accuracy per exit {_percents(np.asarray(accuracy))}",
        f"at most {100 * bound:.1f}%, which is chance and two standard errors",
        "something other than robustness keeps the attack from succeeding, most likely masked gradients",
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


def black_box_is_weaker(black_box: NDArray[np.bool_], gradients: NDArray[np.bool_], name: str) -> Check:
    """Correct answers (N,) under a black-box attack, and under all gradient attacks together."""
    only = int((gradients & ~black_box).sum())
    return Check(
        f"a black box breaks nothing that gradients did not: {name}",
        only <= BLACK_BOX_SHARE * len(gradients),
        f"{only} of {len(gradients)} broken by it alone",
        f"at most {100 * BLACK_BOX_SHARE:.1f}%",
        "gradients are hidden there: more steps, more restarts, or an attack made for this network",
    )


def worst_case_is_lowest(worst: float, singles: Mapping[str, float], name: str) -> Check:
    """The accuracy in the worst case of all attacks is at most the accuracy under each of them."""
    strongest = min(singles, key=lambda attack: singles[attack])
    return Check(
        f"the worst case is no better than any single attack: {name}",
        worst <= singles[strongest] + 1e-12,
        f"{100 * worst:.1f}% against {100 * singles[strongest]:.1f}% under {strongest}",
        "at most that",
        "the report contradicts itself",
    )


def autoattack_is_stronger(autoattack: float, pgd: float, name: str) -> Check:
    """Accuracy under AutoAttack and under PGD on the same samples."""
    return Check(
        f"AutoAttack is no weaker than PGD: {name}",
        autoattack <= pgd + SLACK,
        f"{100 * autoattack:.1f}% against {100 * pgd:.1f}%",
        "at most that",
        "AutoAttack was stopped early or could not follow the gradient",
    )


def basic_checks(context: AttackContext, results: AttackResults) -> list[Check]:
    """The checks that need only a few forward passes."""
    images, labels = (tensor[:CHECK_IMAGES] for tensor in context.tensors()[:2])
    by_noise, by_attack = (correct_predictions(results.pgd[name], results.labels) for name in (NOISE, "average"))
    return [
        deterministic(context.model, images),
        gradients_present(context.model, images, labels),
        noise_is_weaker(by_noise, by_attack),
        *_worst_case_checks(context, results),
    ]


def curve_checks(context: AttackContext, curve: Mapping[float, Mapping[str, Logits]]) -> list[Check]:
    """The checks of accuracy against the radius, and of twice the steps."""
    accuracies = {eps: _self_accuracy(attacks, context.labels) for eps, attacks in curve.items()}
    doubled = single_attacks(context, replace(context.pgd, steps=2 * context.pgd.steps))
    checks = [
        accuracy_falls_with_eps(accuracies),
        converged(accuracies[context.pgd.eps], _self_accuracy(doubled, context.labels)),
    ]
    if context.pgd.eps <= context.large_eps:
        n, classes, eps = len(context.labels), len(context.target.data.classes), context.large_eps
        checks.append(large_eps_breaks_everything(accuracies[eps], eps, n, classes))
    return checks


def black_box_checks(context: AttackContext, results: AttackResults) -> list[Check]:
    """Square and RayS against the gradient attacks, for each budget.

    AutoAttack counts as neither, because it contains Square.
    """
    checks = []
    for name, budget in context.target.budgets.items():
        gradient_attacks = [
            attack
            for attack in results.attacks(name)
            if attack not in BLACK_BOX and not attack.startswith("autoattack")
        ]
        for attack in BLACK_BOX:
            if attack in results.budgets.get(name, {}):
                alone = robust_under(results, name, budget, [attack])
                others = robust_under(results, name, budget, gradient_attacks)
                checks.append(black_box_is_weaker(alone, others, f"{name}, {attack}"))
    return checks


def autoattack_checks(
    context: AttackContext, results: AttackResults, warnings: Mapping[str, tuple[str, ...]]
) -> list[Check]:
    """AutoAttack against PGD on the same exit and samples, and the package's warnings by attacked network."""
    checks = []
    for number, logits in results.autoattack.items():
        k = results.numbers.index(number) + 1
        by_pgd = correct_at(results.pgd[f"exit {number}"][:, results.strong_index], context.labels, k)
        by_autoattack = correct_at(logits, context.labels, k)
        checks.append(autoattack_is_stronger(float(by_autoattack.mean()), float(by_pgd.mean()), f"exit {number}"))
    for name, texts in warnings.items():
        checks.append(
            Check(
                f"AutoAttack raises no flag of its own: {name}",
                not texts,
                "; ".join(texts) or "none",
                "none",
                "see the package's list of flags",
            )
        )
    return checks


def _worst_case_checks(context: AttackContext, results: AttackResults) -> list[Check]:
    labels = results.labels[results.common_index]
    worst = worst_per_exit(results)
    checks = []
    for k, number in enumerate(results.numbers, start=1):
        singles = {name: float(correct_at(logits, labels, k).mean()) for name, logits in results.attacks().items()}
        checks.append(worst_case_is_lowest(float(worst[k - 1].mean()), singles, f"exit {number}"))
    for name, budget in context.target.budgets.items():
        attacks = results.attacks(name)
        singles = {attack: float(robust_under(results, name, budget, [attack]).mean()) for attack in attacks}
        together = float(robust_under(results, name, budget, attacks).mean())
        checks.append(worst_case_is_lowest(together, singles, name))
    return checks


def _self_accuracy(attacks: Mapping[str, Logits], labels: Labels) -> list[float]:
    """Accuracy of each exit under the attack on itself, E numbers."""
    return [float(correct_at(logits, labels, k).mean()) for k, logits in enumerate(attacks.values(), start=1)]


def _percents(values: NDArray[np.floating]) -> str:
    return " / ".join(f"{100 * value:.1f}%" for value in values)
