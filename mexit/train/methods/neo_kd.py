"""`neo-kd`: NEO-KD (S. Ham, J. Park, D.-J. Han, J. Moon, NeurIPS 2023, arXiv 2311.00428), section 3.2.

    loss = sum_i [ CE(f_i(x), y) + CE(f_i(x_adv), y) + gamma_i ( alpha NKD_i + beta EOKD_i ) ]

    NKD_i   attacked exit i learns the mean clean prediction of its neighbours i-1, i, i+1
    EOKD_i  attacked exit i learns the clean prediction of exit i at the true class and at a random group of the
            other classes; the groups of different exits are disjoint, so their soft labels are orthogonal except at
            the true class

Published: the roles of clean and attacked predictions, neighbour averaging, random disjoint groups, alpha = 3,
beta = 1, and gamma by data set: 1 for MNIST and CIFAR-10; 1 for the first three exits and 1.5 for later ones for
CIFAR-100, Tiny-ImageNet and ImageNet. Our readings, each with an option: exit i is part of its own average
(`include_self`), the groups are drawn for each sample and epoch (`redraw`), the targets are scaled to sum to 1
(`renormalise`). The soft loss is cross-entropy with a detached target at temperature 1. Other data sets have
gamma = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mexit.errors import UsageError
from mexit.train.methods.adversarial import Adversarial
from mexit.train.methods.base import Outputs, Setup, TrainingMethod
from mexit.train.methods.distillation import soft_cross_entropy

LATE_EXIT_GAMMA = {"cifar100": 1.5, "tiny-imagenet": 1.5, "imagenet": 1.5}  # from exit 4 on


@dataclass
class NeoKD(TrainingMethod):
    """NEO-KD.

    Attributes:
        gamma: weight of distillation at each exit, (E,); () = the published weights of the data set.
        alpha, beta: weights of NKD and EOKD; 0 removes the term.
        clean_weight, attacked_weight: weights of the two cross-entropies.
        ensemble: NKD's teacher for exit i: its "neighbours", "none" (exit i alone) or "all" exits.
        include_self: whether the neighbours include exit i.
        redraw: when the groups of classes are drawn: for each "sample" and epoch, once for each "batch", or "fixed".
        renormalise: scale EOKD's targets to sum to 1.
    """

    gamma: tuple[float, ...] = ()
    alpha: float = 3.0
    beta: float = 1.0
    clean_weight: float = 1.0
    attacked_weight: float = 1.0
    ensemble: Literal["neighbours", "none", "all"] = "neighbours"
    include_self: bool = True
    redraw: Literal["sample", "batch", "fixed"] = "sample"
    renormalise: bool = True

    def setup(self, run: Setup) -> None:
        super().setup(run)
        self.gamma = self.gamma or published_gamma(run.data_set, run.exits)
        if len(self.gamma) != run.exits:
            raise UsageError(f"gamma needs one weight for each of {run.exits} exits, found {self.gamma}")
        self.exit_gamma = torch.tensor(self.gamma, device=run.device)

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """The adversarial baseline, NKD and EOKD."""
        attacked = outputs.require_attacked()
        terms = Adversarial(self.clean_weight, self.attacked_weight).terms(outputs)
        teacher = outputs.clean.detach().softmax(dim=-1)
        gamma = self.exit_gamma
        if self.alpha:
            targets = neighbour_targets(teacher, self.ensemble, self.include_self)
            terms["nkd"] = self.alpha * (gamma * soft_cross_entropy(attacked, targets)).sum()
        if self.beta:
            targets = orthogonal_targets(teacher, outputs.labels, self.class_groups(outputs), self.renormalise)
            terms["eokd"] = self.beta * (gamma * soft_cross_entropy(attacked, targets)).sum()
        return terms

    def class_groups(self, outputs: Outputs) -> Tensor:
        """The wrong classes that each exit keeps, (E, B, C) bool; see `draw_class_groups`."""
        exits, rows, classes = outputs.clean.shape
        rng, index = outputs.batch.rng, outputs.batch.index
        if self.redraw == "sample":
            return draw_class_groups(rng.uniform("eokd", index, (classes,)), outputs.labels, exits)
        # One key in every process: neither the samples of this process nor their number enter it.
        key = index.new_zeros(1)
        if self.redraw == "batch":
            keys = rng.uniform("eokd", key + outputs.step.number, (classes,))
        else:
            keys = type(rng)(rng.seed, 0).uniform("eokd", key, (classes,))
        return partition_classes(keys[0], exits)[:, None].expand(exits, rows, classes)


def published_gamma(data_set: str, exits: int) -> tuple[float, ...]:
    """Gamma as published for a data set, (E,)."""
    late = LATE_EXIT_GAMMA.get(data_set, 1.0)
    return tuple(1.0 if k < 3 else late for k in range(exits))


def neighbour_targets(teacher: Tensor, ensemble: str = "neighbours", include_self: bool = True) -> Tensor:
    """NKD's soft labels: clean predictions (E, B, C) to the mean over each exit's neighbours, (E, B, C)."""
    exits = len(teacher)
    if ensemble == "none" or exits == 1:
        return teacher
    if ensemble == "all":
        return teacher.mean(dim=0, keepdim=True).expand_as(teacher)
    means = []
    for i in range(exits):
        members = [k for k in (i - 1, i, i + 1) if 0 <= k < exits and (include_self or k != i)]
        means.append(teacher[members].mean(dim=0))
    return torch.stack(means)


def draw_class_groups(keys: Tensor, labels: Tensor, exits: int) -> Tensor:
    """A random group of wrong classes for every exit and sample.

    A random order of the C-1 wrong classes of a sample is cut into E groups of floor((C-1)/E); the classes left over
    are in no group.

    Args:
        keys: uniform numbers in [0, 1) whose order is the order of the classes, (B, C).
        labels: (B,) int64.
        exits: E.

    Returns:
        (E, B, C) bool; False at the label.
    """
    keys = keys.scatter(1, labels[:, None], 2.0)  # the label comes last, so it is in no group
    return _cut(keys, exits).permute(1, 0, 2)


def partition_classes(keys: Tensor, exits: int) -> Tensor:
    """One random partition of all classes: keys (C,) to E disjoint groups of floor((C-1)/E), (E, C) bool."""
    return _cut(keys[None], exits)[0]


def _cut(keys: Tensor, exits: int) -> Tensor:
    """The classes in the order of their keys, cut into E groups of floor((C-1)/E): (B, C) to (B, E, C) bool."""
    size = (keys.shape[1] - 1) // exits
    rank = keys.argsort(dim=1).argsort(dim=1)
    first = torch.arange(exits, device=keys.device)[:, None] * size
    return (rank[:, None] >= first) & (rank[:, None] < first + size)


def orthogonal_targets(teacher: Tensor, labels: Tensor, groups: Tensor, renormalise: bool = True) -> Tensor:
    """EOKD's soft labels: clean predictions (E, B, C) at the true class and the exit's group, 0 elsewhere."""
    kept = groups.clone()
    kept[:, torch.arange(len(labels), device=labels.device), labels] = True
    targets = torch.where(kept, teacher, torch.zeros_like(teacher))
    return targets / targets.sum(dim=-1, keepdim=True).clamp_min(1e-12) if renormalise else targets
