"""Whether an evaluation can be believed: which checks of `evaluate.sanity_checks` its evidence allows.

The cheap ones always run; each further group of attacks brings its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mexit.evaluate import sanity_checks
from mexit.evaluate.results import NOISE, AttackResults, right_at, robust_under, worst_per_exit
from mexit.evaluate.sanity_checks import Check
from mexit.evaluate.suites import BLACK_BOXES, EVERYTHING, AttackContext, under_singles
from mexit.evaluate.target import Labels, Logits
from mexit.train.validation import correct_predictions

FEW = 64
BLACK_BOX = ("square", *BLACK_BOXES)


def cheap(place: AttackContext, evidence: AttackResults) -> list[Check]:
    """Those that need a handful of passes."""
    images, labels = torch.from_numpy(place.images[:FEW]), torch.from_numpy(place.labels[:FEW])
    by_noise, by_attack = (
        correct_predictions(evidence.everywhere[name], evidence.labels) for name in (NOISE, "average")
    )
    return [
        sanity_checks.deterministic(place.model, images),
        sanity_checks.gradients_present(place.model, images, labels),
        sanity_checks.noise_is_weaker(by_noise, by_attack),
        *_worst_is_worst(place, evidence),
    ]


def of_curve(place: AttackContext, points: Mapping[float, Mapping[str, Logits]]) -> list[Check]:
    """Those that follow from accuracy against the radius, and from twice the steps."""
    accuracies = {eps: _own(judged, place.labels) for eps, judged in points.items()}
    doubled = under_singles(place, replace(place.steps, steps=2 * place.steps.steps))
    classes = len(place.subject.data.classes)
    found = [
        sanity_checks.falls_with_eps(accuracies),
        sanity_checks.converged(accuracies[place.steps.eps], _own(doubled, place.labels)),
    ]
    if place.steps.eps <= EVERYTHING:
        found.append(
            sanity_checks.large_eps_breaks(accuracies[EVERYTHING], EVERYTHING, len(place.labels), classes)
        )
    return found


def of_black_box(place: AttackContext, evidence: AttackResults) -> list[Check]:
    """Whether Square or RayS found what gradients did not, on every budget. Square is in AutoAttack: left out."""
    found = []
    for name, deployed in place.subject.budgets.items():
        own = evidence.budgets.get(name, {})
        by_gradients = [
            attack
            for attack in evidence.attacks(name)
            if attack not in BLACK_BOX and not attack.startswith("autoattack")
        ]
        for attack in BLACK_BOX:
            if attack in own:
                alone = robust_under(evidence, name, deployed, [attack])
                others = robust_under(evidence, name, deployed, by_gradients)
                found.append(sanity_checks.black_box_is_weaker(alone, others, f"{name}, {attack}"))
    return found


def of_autoattack(
    place: AttackContext, evidence: AttackResults, warnings: Mapping[str, tuple[str, ...]]
) -> list[Check]:
    """AutoAttack against PGD on the same exit and samples, and what the package warned of."""
    found = []
    for k, logits in evidence.autoattack.items():
        pgd = right_at(evidence.everywhere[f"exit {k}"][:, evidence.strong], place.labels, k)
        by_auto = right_at(logits, place.labels, k)
        found.append(sanity_checks.stronger_than_pgd(float(by_auto.mean()), float(pgd.mean()), f"exit {k}"))
    for target, texts in warnings.items():
        found.append(
            Check(
                f"AutoAttack raises no flag of its own: {target}",
                not texts,
                "; ".join(texts) or "none",
                "none",
                "see the package's list of flags",
            )
        )
    return found


def _worst_is_worst(place: AttackContext, evidence: AttackResults) -> list[Check]:
    labels = evidence.labels[evidence.judged]
    worst = worst_per_exit(evidence)
    found = []
    for k in range(1, evidence.exits + 1):
        singles = {name: float(right_at(logits, labels, k).mean()) for name, logits in evidence.attacks().items()}
        found.append(sanity_checks.worst_is_worst(float(worst[k - 1].mean()), singles, f"exit {k}"))
    for name, deployed in place.subject.budgets.items():
        conditions = evidence.attacks(name)
        singles = {attack: float(robust_under(evidence, name, deployed, [attack]).mean()) for attack in conditions}
        together = float(robust_under(evidence, name, deployed, conditions).mean())
        found.append(sanity_checks.worst_is_worst(together, singles, name))
    return found


def _own(judged: Mapping[str, Logits], labels: Labels) -> list[float]:
    """Accuracy of every exit under the attack on itself, (E,)."""
    return [float(right_at(logits, labels, k).mean()) for k, logits in enumerate(judged.values(), start=1)]


def to_json(check: Check) -> dict[str, Any]:
    """As the report holds it."""
    return {name: np.asarray(value).item() for name, value in vars(check).items()}
