"""Attacks on a deployed policy, with known thresholds: the attacker may choose which exit answers.

Robustness of every single exit is no guarantee for the policy over them (On the perils of cascading robust
classifiers, ICLR 2023). Two gradient attacks take the thresholds into account; both are our own:

route   for an exit j and a class t: the log-odds margin of t at exit j, minus a penalty for every earlier exit that
        would answer and for exit j not answering:
        a * (sum_{i < j} relu(m_i + d) + relu(d - m_j)), m the margins to the thresholds (see `soft_policy`)
soft    cross-entropy of the softened policy, at several temperatures

Every intermediate image is evaluated by the real policy, and for each sample the most damaging one is kept. Later runs
attack only the samples that are still undamaged.
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
from mexit.attacks.pgd import PGDConfig, frozen, pgd, start_noise
from mexit.attacks.rng import CounterRNG
from mexit.attacks.soft_policy import Decision, SoftPolicy, decide, numpy_logits
from mexit.models.multi_exit import MultiExit
from mexit.models.scores_torch import ExitScores, score_exits

TEMPERATURES = (1.0, 0.3, 0.1)
CLASSES = 9
# Weight a and slack d of the thresholds in the loss; margins to thresholds are in spreads, class margins in log-odds.
THRESHOLD_WEIGHT, THRESHOLD_SLACK = 5.0, 0.05

DamageFn = Callable[[Decision, NDArray[np.int64]], NDArray[np.int64]]  # decision and labels (B,) to damage (B,)
PolicyLossFn = Callable[[Tensor, ExitScores], Tensor]  # logits (E, B, C) and their scores to losses (B,)


@dataclass(frozen=True)
class AttackTarget:
    """A policy, the images to attack and the parameters of the attack.

    Attributes:
        model: the network.
        policy: the policy over its exits.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) int64.
        index: positions of the samples in the data set, (B,) int64.
        pgd: parameters of every run.
        seed: seed of the random starts.
    """

    model: MultiExit
    policy: SoftPolicy
    images: Tensor
    labels: Tensor
    index: Tensor
    pgd: PGDConfig
    seed: int = 0


class AttackSearch:
    """Search for the most damaging image of each sample.

    Args:
        target: what is attacked.
        damage: decision and labels to the damage of each sample, whole numbers, larger is worse.
        enough: samples with this much damage are not attacked again.

    Attributes:
        images: the most damaging images so far, (B, C, H, W).
        damage: their damage, (B,) int64.
        passes: number of images that the network has evaluated.
    """

    def __init__(self, target: AttackTarget, damage: DamageFn, enough: int) -> None:
        self.target, self._damage_fn, self._enough = target, damage, enough
        self.images = target.images.clone()
        self.damage = np.zeros(len(target.labels), np.int64)
        self.passes = 0
        with torch.no_grad():
            self._update(np.arange(len(self.damage)), self.images, target.model(self.images))

    def remaining(self) -> NDArray[np.intp]:
        """Positions of the samples with less than enough damage."""
        rows: NDArray[np.intp] = np.flatnonzero(self.damage < self._enough)
        return rows

    def run(self, stream: str, loss_fn: PolicyLossFn, rows: NDArray[np.intp]) -> None:
        """Maximise `loss_fn` on the samples at `rows`, and keep every image that is more damaging than the best so far.

        `stream` names the random numbers of the start.
        """
        target, chosen = self.target, torch.from_numpy(rows)
        images = target.images[chosen]

        def evaluated_loss(attacked: Tensor) -> Tensor:
            logits = target.model(attacked)
            self._update(rows, attacked.detach(), logits)
            return loss_fn(logits, score_exits(target.policy.policy, logits))

        noise = start_noise(CounterRNG(target.seed, 0), stream, target.index[chosen], images, target.pgd)
        with frozen(target.model, train_mode=False):
            last = pgd(images, target.pgd, evaluated_loss, noise)
        with torch.no_grad():
            self._update(rows, last, target.model(last))

    def _update(self, rows: NDArray[np.intp], images: Tensor, logits: Tensor) -> None:
        self.passes += len(rows)
        # A random start may lie outside [0, 1]: `pgd` clips after its first step.
        valid = ((images >= 0) & (images <= 1)).flatten(1).all(dim=1).cpu().numpy()
        decision = decide(self.target.policy.policy, numpy_logits(logits))
        damage = self._damage_fn(decision, self.target.labels.cpu().numpy()[rows])
        worse = valid & (damage > self.damage[rows])
        self.damage[rows[worse]] = damage[worse]
        self.images[torch.from_numpy(rows[worse])] = images[torch.from_numpy(worse)]


def misclassified(decision: Decision, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Damage of 1 where the predicted class is wrong, (B,)."""
    damage: NDArray[np.int64] = (decision.classes != labels).astype(np.int64)
    return damage


def route_attack(target: AttackTarget, classes: int = CLASSES) -> AttackSearch:
    """Attack towards a wrong class at an exit, over all exits and the most likely wrong classes.

    Args:
        target: what is attacked.
        classes: number of classes to try at each exit, the most likely first; at most C - 1 are used.
    """
    search = AttackSearch(target, misclassified, enough=1)
    with torch.no_grad():
        log_probabilities = score_exits(target.policy.policy, target.model(target.images)).log_probabilities
    labels = target.labels.expand(len(log_probabilities), -1).unsqueeze(-1)
    ranked = log_probabilities.scatter(-1, labels, -torch.inf).argsort(dim=-1, descending=True)
    for j in _answering_exits(target.policy):
        for rank in range(min(classes, log_probabilities.shape[-1] - 1)):
            rows = search.remaining()
            if not len(rows):
                return search
            loss_fn = route_loss(target.policy, j, ranked[j, torch.from_numpy(rows), rank])
            search.run(f"route {j + 1} {rank}", loss_fn, rows)
    return search


def route_loss(policy: SoftPolicy, j: int, classes: Tensor) -> PolicyLossFn:
    """The loss of `route_attack`: exit j, from 0, shall answer with the given classes, (B,)."""

    def loss_fn(_: Tensor, exit_scores: ExitScores) -> Tensor:
        margins = policy.margins_to_threshold(exit_scores.scores)
        penalty = F.relu(margins[:j] + THRESHOLD_SLACK).sum(dim=0)
        if j < len(margins):
            penalty = penalty + F.relu(THRESHOLD_SLACK - margins[j])
        return -margin(exit_scores.log_probabilities[j : j + 1], classes)[0] - THRESHOLD_WEIGHT * penalty

    return loss_fn


def soft_attack(target: AttackTarget, temperatures: Sequence[float] = TEMPERATURES) -> AttackSearch:
    """Attack the cross-entropy of the softened policy, one run per temperature."""
    search = AttackSearch(target, misclassified, enough=1)
    for temperature in temperatures:
        rows = search.remaining()
        if not len(rows):
            break
        search.run(f"soft {temperature:g}", _soft_loss(target, temperature, rows), rows)
    return search


def _answering_exits(policy: SoftPolicy) -> Iterator[int]:
    """The exits that can answer, from 0; the last first, where most samples are damaged."""
    yield len(policy.policy.thresholds)
    yield from (j for j, threshold in enumerate(policy.policy.thresholds) if threshold is not None)


def _soft_loss(target: AttackTarget, temperature: float, rows: NDArray[np.intp]) -> PolicyLossFn:
    labels = target.labels[torch.from_numpy(rows)]

    def loss_fn(_: Tensor, exit_scores: ExitScores) -> Tensor:
        return F.cross_entropy(target.policy.mixture(exit_scores, temperature), labels, reduction="none")

    return loss_fn
