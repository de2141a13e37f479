"""Attacks on a deployed policy: the attacker knows the thresholds and chooses which exit answers.

Exits that are each robust are no guarantee for the policy over them (On the perils of cascading robust
classifiers, ICLR 2023). Besides replaying images made against the exits, two attacks climb through the gates:

route   for an exit j and a class t: log-odds margin of t at exit j, minus what keeps the sample from reaching j or
        from leaving there, a * (sum_{i < j} relu(lead_i + d) + relu(d - lead_j))
soft    cross-entropy of the softened policy, see `gates`, at several temperatures

Both are our own. Every image on the way is put through the real decision and the first one that does harm is kept,
so a sample that once was broken stays broken; later climbs are only run on those that still stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mexit.attacks.losses import margin
from mexit.attacks.multi_exit_attack import frozen, start_noise
from mexit.attacks.pgd import PGDConfig, pgd
from mexit.attacks.rng import CounterRNG
from mexit.attacks.soft_policy import Decision, ExitScores, SoftPolicy, decide, numpy_logits, score_exits
from mexit.models.multi_exit import MultiExit

TEMPERATURES = (1.0, 0.3, 0.1)
TARGETS = 9
# Of the gates in the loss of a route; leads are in spreads, margins in units of log-odds.
GATE_WEIGHT, GATE_SLACK = 5.0, 0.05

Harm = Callable[[Decision, NDArray[np.int64]], NDArray[np.int64]]
LossFn = Callable[[Tensor, ExitScores], Tensor]


@dataclass(frozen=True)
class AttackTarget:
    """What is attacked, and how.

    Attributes:
        model, gates: the policy and the network behind it.
        images: (B, C, H, W) in [0, 1]; `labels` (B,) int64; `index` places in the data set, (B,) int64.
        steps: of every climb.
        seed: of the random starts.
    """

    model: MultiExit
    gates: SoftPolicy
    images: Tensor
    labels: Tensor
    index: Tensor
    steps: PGDConfig
    seed: int = 0


class AttackSearch:
    """The most harmful image found so far for each sample.

    Args:
        victim: what is attacked.
        harm: of a decision, (B,) whole numbers; larger is worse.
        enough: a sample with so much harm is left alone.

    Attributes:
        images: (B, C, H, W).
        harm: that they do, (B,).
        passes: images that went through the network, forward and backward.
    """

    def __init__(self, victim: AttackTarget, damage: Harm, enough: int) -> None:
        self.victim, self._harm_of, self._enough = victim, damage, enough
        self.images = victim.images.clone()
        self.damage = np.zeros(len(victim.labels), np.int64)
        self.passes = 0
        with torch.no_grad():
            self._see(np.arange(len(self.damage)), self.images, victim.model(self.images))

    def standing(self) -> NDArray[np.intp]:
        """Samples that still do less harm than enough."""
        rows: NDArray[np.intp] = np.flatnonzero(self.damage < self._enough)
        return rows

    def climb(self, stream: str, loss: LossFn, rows: NDArray[np.intp]) -> None:
        """Climb `loss`, (B,) from logits (E, B, C) and their judgement, on the samples `rows`."""
        victim, chosen = self.victim, torch.from_numpy(rows)
        images = victim.images[chosen]

        def seen(moving: Tensor) -> Tensor:
            logits = victim.model(moving)
            self._see(rows, moving.detach(), logits)
            return loss(logits, score_exits(victim.gates.policy, logits))

        noise = start_noise(CounterRNG(victim.seed, 0), stream, victim.index[chosen], images, victim.steps)
        with frozen(victim.model, train_mode=False):
            last = pgd(images, victim.steps, seen, noise)
        with torch.no_grad():
            self._see(rows, last, victim.model(last))

    def _see(self, rows: NDArray[np.intp], images: Tensor, logits: Tensor) -> None:
        self.passes += len(rows)
        # A random start is no image yet: `pgd` projects after its first step.
        inside = ((images >= 0) & (images <= 1)).flatten(1).all(dim=1).cpu().numpy()
        decision = decide(self.victim.gates.policy, numpy_logits(logits))
        damage = self._harm_of(decision, self.victim.labels.cpu().numpy()[rows])
        worse = inside & (damage > self.damage[rows])
        self.damage[rows[worse]] = damage[worse]
        self.images[torch.from_numpy(rows[worse])] = images[torch.from_numpy(worse)]


def wrong(decision: Decision, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The harm of a wrong answer: 1."""
    found: NDArray[np.int64] = (decision.classes != labels).astype(np.int64)
    return found


def route_attack(victim: AttackTarget, targets: int = TARGETS) -> AttackSearch:
    """To a wrong class at an exit of the attacker's choice, over all exits and the likeliest wrong classes.

    Args:
        victim: what is attacked.
        targets: how many classes to try at each exit, likeliest first, at most C - 1.
    """
    hunt = AttackSearch(victim, wrong, enough=1)
    with torch.no_grad():
        answers = score_exits(victim.gates.policy, victim.model(victim.images)).log_answers
    ranked = answers.scatter(-1, victim.labels.expand(len(answers), -1).unsqueeze(-1), -torch.inf).argsort(
        dim=-1, descending=True
    )
    for j in _reachable(victim.gates):
        for rank in range(min(targets, answers.shape[-1] - 1)):
            rows = hunt.standing()
            if not len(rows):
                return hunt
            loss = route_loss(victim.gates, j, ranked[j, torch.from_numpy(rows), rank])
            hunt.climb(f"route {j + 1} {rank}", loss, rows)
    return hunt


def route_loss(gates: SoftPolicy, j: int, targets: Tensor) -> LossFn:
    """What `route_attack` climbs: exit j, from 0, is to answer with the classes `targets` (B,)."""

    def loss(_: Tensor, judged: ExitScores) -> Tensor:
        leads = gates.leads(judged.scores)
        barred = F.relu(leads[:j] + GATE_SLACK).sum(dim=0)
        if j < len(leads):
            barred = barred + F.relu(GATE_SLACK - leads[j])
        return -margin(judged.log_answers[j : j + 1], targets)[0] - GATE_WEIGHT * barred

    return loss


def soft_attack(victim: AttackTarget, temperatures: Sequence[float] = TEMPERATURES) -> AttackSearch:
    """Through the softened policy, once for each temperature."""
    hunt = AttackSearch(victim, wrong, enough=1)
    for temperature in temperatures:
        rows = hunt.standing()
        if not len(rows):
            break
        hunt.climb(f"soft {temperature:g}", _soft(victim, temperature, rows), rows)
    return hunt


def _reachable(gates: SoftPolicy) -> Iterator[int]:
    """Places of the exits that can answer at all, from 0; the last first, where most of the harm is done."""
    yield len(gates.policy.thresholds)
    yield from (place for place, threshold in enumerate(gates.policy.thresholds) if threshold is not None)


def _soft(victim: AttackTarget, temperature: float, rows: NDArray[np.intp]) -> LossFn:
    labels = victim.labels[torch.from_numpy(rows)]

    def loss(_: Tensor, judged: ExitScores) -> Tensor:
        return F.cross_entropy(victim.gates.mixture(judged, temperature), labels, reduction="none")

    return loss
