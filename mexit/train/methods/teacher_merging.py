"""One vector of logits out of several teachers', for each sample (AT-AKA's knowledge amalgamation).

softmin       sum_m w_m z_m, w = softmax_m( -CE(z_m, y) / tau ): who knows the sample speaks
correct-mean  the mean of those that are right about the sample; where nobody is, the least wrong, not trusted
min-logit     at class j the smallest z_m[j] - z_m[y]: no rival class looks better than to its strictest judge, so
              the amalgam is right wherever one of them is (as in KDCL, Q. Guo et al., CVPR 2020)
mean          of all, for comparison

Certain, from the abstract: one amalgamated vector a sample, adapted to how the teachers do on it. The rules are
readings; no equation was found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mexit.attacks.losses import exit_losses
from mexit.errors import UsageError

MERGES = ("softmin", "correct-mean", "min-logit", "mean")


@dataclass(frozen=True)
class MergedLogits:
    """What a student is to learn.

    Attributes:
        logits: (B, C) float32.
        trusted: (B,) bool; where False the student learns from the label alone.
    """

    logits: Tensor
    trusted: Tensor


def amalgamate(logits: Tensor, labels: Tensor, merge: str = "softmin", tau: float = 1.0) -> MergedLogits:
    """Merge the teachers' logits.

    Args:
        logits: of M teachers, (M, B, C).
        labels: (B,) int64.
        merge: one of `MERGES`.
        tau: softmin's temperature; near 0 only the best teacher speaks, far above 1 it is the mean.
    """
    logits = logits.float()
    trusted = torch.ones_like(labels, dtype=torch.bool)
    if merge == "mean":
        return MergedLogits(logits.mean(dim=0), trusted)
    if merge == "softmin":
        weights = (-exit_losses(logits, labels) / tau).softmax(dim=0)
        return MergedLogits((weights[..., None] * logits).sum(dim=0), trusted)
    if merge == "min-logit":
        truth = labels.expand(len(logits), -1).unsqueeze(-1)
        return MergedLogits((logits - logits.gather(-1, truth)).amin(dim=0), trusted)
    if merge == "correct-mean":
        right = logits.argmax(dim=-1) == labels
        trusted = right.any(dim=0)
        best = torch.zeros_like(right).scatter(0, exit_losses(logits, labels).argmin(dim=0, keepdim=True), True)
        heard = torch.where(trusted, right, best).float()[..., None]
        return MergedLogits((heard * logits).sum(dim=0) / heard.sum(dim=0), trusted)
    raise UsageError(f"unknown merge '{merge}': choose from {', '.join(MERGES)}")
