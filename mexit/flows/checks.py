"""Whether an evaluation can be believed: which checks of `train.attacks.sanity` its evidence allows.

The cheap ones always run; each further group of attacks brings its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mexit.flows.strong_attacks import BLACK_BOXES, EVERYTHING, Range, under_singles
from mexit.flows.subject import Labels, Logits
from mexit.flows.verdicts import NOISE, Evidence, right_at, stands, worst_per_exit
from mexit.train.attacks import sanity
from mexit.train.attacks.sanity import Check
from mexit.train.evaluate import right

FEW = 64
BLACK_BOX = ("square", *BLACK_BOXES)


def cheap(place: Range, evidence: Evidence) -> list[Check]:
    """Those that need a handful of passes."""
    images, labels = torch.from_numpy(place.images[:FEW]), torch.from_numpy(place.labels[:FEW])
    by_noise, by_attack = (right(evidence.everywhere[name], evidence.labels) for name in (NOISE, "average"))
    return [
        sanity.deterministic(place.model, images),
        sanity.gradients_present(place.model, images, labels),
        sanity.noise_is_weaker(by_noise, by_attack),
        *_worst_is_worst(place, evidence),
    ]


def of_curve(place: Range, points: Mapping[float, Mapping[str, Logits]]) -> list[Check]:
    """Those that follow from accuracy against the radius, and from twice the steps."""
    accuracies = {eps: _own(judged, place.labels) for eps, judged in points.items()}
    doubled = under_singles(place, replace(place.steps, count=2 * place.steps.count))
    classes = len(place.subject.data.classes)
    found = [
        sanity.falls_with_eps(accuracies),
        sanity.converged(accuracies[place.steps.eps], _own(doubled, place.labels)),
    ]
    if place.steps.eps <= EVERYTHING:
        found.append(sanity.large_eps_breaks(accuracies[EVERYTHING], EVERYTHING, len(place.labels), classes))
    return found


def of_black_box(place: Range, evidence: Evidence) -> list[Check]:
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
                alone = stands(evidence, name, deployed, [attack])
                others = stands(evidence, name, deployed, by_gradients)
                found.append(sanity.black_box_is_weaker(alone, others, f"{name}, {attack}"))
    return found


def of_autoattack(place: Range, evidence: Evidence, warnings: Mapping[str, tuple[str, ...]]) -> list[Check]:
    """AutoAttack against PGD on the same exit and samples, and what the package warned of."""
    found = []
    for k, logits in evidence.autoattack.items():
        pgd = right_at(evidence.everywhere[f"exit {k}"][:, evidence.strong], place.labels, k)
        by_auto = right_at(logits, place.labels, k)
        found.append(sanity.stronger_than_pgd(float(by_auto.mean()), float(pgd.mean()), f"exit {k}"))
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


def _worst_is_worst(place: Range, evidence: Evidence) -> list[Check]:
    labels = evidence.labels[evidence.judged]
    worst = worst_per_exit(evidence)
    found = []
    for k in range(1, evidence.exits + 1):
        singles = {name: float(right_at(logits, labels, k).mean()) for name, logits in evidence.attacks().items()}
        found.append(sanity.worst_is_worst(float(worst[k - 1].mean()), singles, f"exit {k}"))
    for name, deployed in place.subject.budgets.items():
        conditions = evidence.attacks(name)
        singles = {attack: float(stands(evidence, name, deployed, [attack]).mean()) for attack in conditions}
        together = float(stands(evidence, name, deployed, conditions).mean())
        found.append(sanity.worst_is_worst(together, singles, name))
    return found


def _own(judged: Mapping[str, Logits], labels: Labels) -> list[float]:
    """Accuracy of every exit under the attack on itself, (E,)."""
    return [float(right_at(logits, labels, k).mean()) for k, logits in enumerate(judged.values(), start=1)]


def to_json(check: Check) -> dict[str, Any]:
    """As the report holds it."""
    return {name: np.asarray(value).item() for name, value in vars(check).items()}
