"""`neo-kd`: NEO-KD (S. Ham, J. Park, D.-J. Han, J. Moon, NeurIPS 2023, arXiv 2311.00428), section 3.2.

    loss = sum_i [ CE(f_i(x), y) + CE(f_i(x_adv), y) + gamma_i ( alpha NKD_i + beta EOKD_i ) ]

    NKD_i   attacked exit i learns the mean clean prediction of its neighbours i-1, i, i+1
    EOKD_i  attacked exit i learns the clean prediction of exit i at the true class and at a random share of
            the other classes; shares of different exits are disjoint, so their soft labels are orthogonal
            but for the true class

Certain from the paper: the roles of clean and attacked predictions, neighbour averaging, random disjoint shares,
alpha = 3, beta = 1 and gamma per network. Readings, switchable: whether exit i is in its own average
(`include_self`), when shares are drawn (`redraw`), whether targets are scaled to sum to 1 (`renormalise`); the
soft loss is cross-entropy with a detached target at temperature 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mexit.errors import UsageError
from mexit.train.methods.adversarial import Adversarial
from mexit.train.methods.base import Outputs, TrainingMethod
from mexit.train.methods.distillation import soft_cross_entropy

ENSEMBLES = ("neighbours", "none", "all")
REDRAWS = ("sample", "batch", "fixed")


@dataclass(frozen=True)
class NeoKD(TrainingMethod):
    """NEO-KD.

    Attributes:
        alpha, beta: weights of NKD and EOKD; 0 switches one off.
        gamma: one weight an exit, (E,).
        clean_weight, attacked_weight: of the two cross-entropies.
        ensemble: NKD's teacher for exit i: its "neighbours", "none" (exit i alone) or "all" exits.
        include_self: whether the neighbours include exit i.
        redraw: shares of classes anew for each "sample" and epoch, each "batch", or "fixed".
        renormalise: scale EOKD's targets to sum to 1.
    """

    gamma: tuple[float, ...]
    alpha: float = 3.0
    beta: float = 1.0
    clean_weight: float = 1.0
    attacked_weight: float = 1.0
    ensemble: str = "neighbours"
    include_self: bool = True
    redraw: str = "sample"
    renormalise: bool = True

    def __post_init__(self) -> None:
        if self.ensemble not in ENSEMBLES or self.redraw not in REDRAWS:
            raise UsageError(f"ensemble must be one of {ENSEMBLES} and redraw one of {REDRAWS}")

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """See `base.TrainingMethod`."""
        attacked = outputs.need_attacked()
        terms = Adversarial(self.clean_weight, self.attacked_weight).terms(outputs)
        if len(self.gamma) != len(outputs.clean):
            raise UsageError(f"{len(outputs.clean)} exits need as many gammas, found {self.gamma}")
        teacher = outputs.clean.detach().softmax(dim=-1)
        gamma = torch.tensor(self.gamma, device=teacher.device)
        if self.alpha:
            targets = neighbour_targets(teacher, self.ensemble, self.include_self)
            terms["nkd"] = self.alpha * (gamma * soft_cross_entropy(attacked, targets)).sum()
        if self.beta:
            shares = self._shares(outputs, len(teacher), teacher.shape[-1])
            targets = orthogonal_targets(teacher, outputs.labels, shares, self.renormalise)
            terms["eokd"] = self.beta * (gamma * soft_cross_entropy(attacked, targets)).sum()
        return terms

    def _shares(self, outputs: Outputs, exits: int, classes: int) -> Tensor:
        index = outputs.index
        if self.redraw == "fixed":
            keys = type(outputs.draw)(outputs.draw.seed, 0).uniform("eokd", torch.zeros_like(index), (classes,))
        else:
            keys = outputs.draw.uniform("eokd", index if self.redraw == "sample" else index[:1], (classes,))
        return class_shares(keys.expand(len(index), -1), outputs.labels, exits)


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


def class_shares(keys: Tensor, labels: Tensor, exits: int) -> Tensor:
    """Which wrong classes each exit keeps.

    A random order of the C-1 wrong classes is cut into E groups of floor((C-1)/E); what is left over belongs to
    nobody.

    Args:
        keys: random numbers that give the order, (B, C).
        labels: (B,).
        exits: E.

    Returns:
        (E, B, C) bool; never true at the label.
    """
    rows, classes = keys.shape
    size = (classes - 1) // exits
    keys = keys.clone()
    keys[torch.arange(rows, device=keys.device), labels] = 2.0  # behind every wrong class
    rank = keys.argsort(dim=1).argsort(dim=1)
    group = torch.div(rank, max(size, 1), rounding_mode="floor")
    kept = (rank < size * exits) & (rank < classes - 1)
    return torch.stack([kept & (group == k) for k in range(exits)])


def orthogonal_targets(teacher: Tensor, labels: Tensor, shares: Tensor, renormalise: bool = True) -> Tensor:
    """EOKD's soft labels: clean predictions (E, B, C) at the true class and the exit's share, 0 elsewhere."""
    kept = shares.clone()
    kept[:, torch.arange(len(labels), device=labels.device), labels] = True
    targets = torch.where(kept, teacher, torch.zeros_like(teacher))
    return targets / targets.sum(dim=-1, keepdim=True).clamp_min(1e-12) if renormalise else targets
