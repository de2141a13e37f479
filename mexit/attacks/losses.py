"""What an attack climbs at one exit: a number a sample, larger where the attacker is happier.

With z the logits of an exit, y the true class, j any other, pi_1, pi_2, ... the classes in falling order of z:

ce       cross-entropy of z with y
margin   max_j z_j - z_y, above 0 exactly where the answer is wrong (N. Carlini and D. Wagner, S&P 2017)
dlr      (max_j z_j - z_y) / (z_pi_1 - z_pi_3): the margin without its scale (AutoAttack: F. Croce and M. Hein,
         ICML 2020)
logit    -z_y (ThunderNNA)
uniform  minus the cross-entropy of z with the uniform distribution, largest where all classes are equally likely:
         the slowdown attack DeepSloth (S. Hong et al., ICLR 2021)

Given a target class t, all but `uniform` pull towards it instead: -CE(z, t); z_t - max_{j != t} z_j;
(z_t - z_y) / (z_pi_1 - (z_pi_3 + z_pi_4) / 2); z_t.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mexit.errors import UsageError

LOSSES = ("ce", "margin", "dlr", "logit", "uniform")


def sample_loss(loss: str, logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """The loss of every sample, mean over exits.

    `uniform` leaves the last of several exits out: an input is slowed down by keeping it from leaving earlier.

    Args:
        loss: one of `LOSSES`.
        logits: (E, B, C).
        labels: (B,) int64.
        targets: classes to pull towards, (B,) int64; None = away from `labels`.

    Returns:
        (B,) float32.
    """
    if loss == "uniform" and len(logits) > 1:
        logits = logits[:-1]
    return per_exit_loss(loss, logits, labels, targets).mean(dim=0)


def per_exit_loss(loss: str, logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """The loss of every exit and sample: logits (E, B, C), labels and targets (B,) to (E, B) float32.

    Raises:
        UsageError: no such loss, too few classes for it, or a target where it takes none.
    """
    if loss == "ce":
        return exit_losses(logits, labels) if targets is None else -exit_losses(logits, targets)
    logits = logits.float()
    if loss == "margin":
        return margin(logits, labels) if targets is None else -margin(logits, targets)
    if loss == "logit":
        return -_at(logits, labels) if targets is None else _at(logits, targets)
    if loss == "dlr":
        return _dlr(logits, labels, targets)
    if loss != "uniform":
        raise UsageError(f"unknown loss '{loss}': choose from {', '.join(LOSSES)}")
    if targets is not None:
        raise UsageError("the loss 'uniform' has no target class: choose ce, margin, dlr or logit")
    return logits.log_softmax(dim=-1).mean(dim=-1)


def exit_losses(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of every exit and sample: logits (E, B, C), labels (B,) to (E, B) float32.

    `smoothing` in [0, 1) spreads that share of the label over all classes.
    """
    exits, rows, classes = logits.shape
    flat = F.cross_entropy(
        logits.float().reshape(-1, classes), labels.repeat(exits), reduction="none", label_smoothing=smoothing
    )
    return flat.reshape(exits, rows)


def margin(logits: Tensor, classes: Tensor) -> Tensor:
    """The largest other logit minus that of the class: logits (E, B, C), classes (B,) to (E, B)."""
    index = classes.expand(len(logits), -1).unsqueeze(-1)
    others = logits.scatter(-1, index, -math.inf)
    return others.amax(dim=-1) - _at(logits, classes)


def _dlr(logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    needed = 3 if targets is None else 4
    if logits.shape[-1] < needed:
        raise UsageError(
            f"this form of the loss 'dlr' needs {needed} classes, found {logits.shape[-1]}: choose margin"
        )
    top = logits.topk(needed, dim=-1).values
    if targets is None:
        gap, scale = margin(logits, labels), top[..., 0] - top[..., 2]
    else:
        gap = _at(logits, targets) - _at(logits, labels)
        scale = top[..., 0] - (top[..., 2] + top[..., 3]) / 2
    return gap / (scale + 1e-12)


def _at(logits: Tensor, classes: Tensor) -> Tensor:
    """The logit of each sample's class: (E, B, C), (B,) to (E, B)."""
    return logits[:, torch.arange(len(classes), device=logits.device), classes]
