"""Merging the logits of several teachers into one target per sample (AT-AKA's knowledge amalgamation).

softmin       weighted mean, weights softmax_m( -CE(z_m, y) / tau ): teachers that know the sample count more
correct-mean  mean of the teachers that classify the sample correctly; if none does, the one with the smallest
              cross-entropy, marked as not trusted
min-logit     at class j the minimum over teachers of z_m[j] - z_m[y], so that the target is correct wherever one
              teacher is (as in KDCL, Q. Guo et al., CVPR 2020)
mean          mean of all, for comparison

S. M. Hamidi, L. Ye, arXiv 2405.13324. Published, in the abstract: one vector per sample, adapted to the teachers'
performance on it. The rules are our readings; no equation was available.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mexit.attacks.losses import exit_cross_entropy
from mexit.errors import UsageError

MERGES = ("softmin", "correct-mean", "min-logit", "mean")


@dataclass(frozen=True)
class MergedLogits:
    """The target of a student.

    Attributes:
        logits: (B, C) float32.
        trusted: (B,) bool; where False the student learns from the label alone.
    """

    logits: Tensor
    trusted: Tensor


def merge_logits(logits: Tensor, labels: Tensor, merge: str = "softmin", tau: float = 1.0) -> MergedLogits:
    """Merge the teachers' logits.

    Args:
        logits: of M teachers, (M, B, C).
        labels: (B,) int64.
        merge: one of `MERGES`.
        tau: temperature of softmin, above 0; near 0 it takes the best teacher, for large values the mean.

    Raises:
        UsageError: unknown merge.
    """
    logits = logits.float()
    trusted = torch.ones_like(labels, dtype=torch.bool)
    if merge == "mean":
        return MergedLogits(logits.mean(dim=0), trusted)
    if merge == "softmin":
        weights = (-exit_cross_entropy(logits, labels) / tau).softmax(dim=0)
        return MergedLogits((weights[..., None] * logits).sum(dim=0), trusted)
    if merge == "min-logit":
        label_column = labels.expand(len(logits), -1).unsqueeze(-1)
        return MergedLogits((logits - logits.gather(-1, label_column)).amin(dim=0), trusted)
    if merge == "correct-mean":
        correct = logits.argmax(dim=-1) == labels
        trusted = correct.any(dim=0)
        best = torch.zeros_like(correct).scatter(
            0, exit_cross_entropy(logits, labels).argmin(dim=0, keepdim=True), True
        )
        selected = torch.where(trusted, correct, best).float()[..., None]
        return MergedLogits((selected * logits).sum(dim=0) / selected.sum(dim=0), trusted)
    raise UsageError(f"unknown merge '{merge}': choose from {', '.join(MERGES)}")
