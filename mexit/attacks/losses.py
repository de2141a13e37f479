"""Losses that an attack maximises: one number per exit and sample.

With z the logits of an exit, y the true class, j any other class, pi_1, pi_2, ... the classes by falling logit:

ce       cross-entropy of z with y
margin   max_{j != y} z_j - z_y, above 0 exactly where the prediction is wrong (N. Carlini and D. Wagner, S&P 2017)
dlr      (max_{j != y} z_j - z_y) / (z_pi_1 - z_pi_3), the margin without its scale (F. Croce and M. Hein,
         AutoAttack, ICML 2020)
logit    -z_y (ThunderNNA, arXiv 2111.12305)
uniform  minus the cross-entropy of the uniform distribution with softmax(z): the slowdown loss of DeepSloth (S. Hong
         et al., ICLR 2021)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mexit.errors import UsageError

LOSSES = ("ce", "margin", "dlr", "logit", "uniform")


def sample_loss(loss: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each sample, averaged over exits: logits (E, B, C), labels (B,) to (B,) float32.

    `uniform` leaves out the last of several exits: a sample is slow if no earlier exit is confident.
    """
    if loss == "uniform" and len(logits) > 1:
        logits = logits[:-1]
    return exit_loss(loss, logits, labels).mean(dim=0)


def exit_loss(loss: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each exit and sample: logits (E, B, C), labels (B,) to (E, B) float32.

    Raises:
        UsageError: the loss is unknown or needs more classes.
    """
    if loss == "ce":
        return exit_cross_entropy(logits, labels)
    logits = logits.float()
    if loss == "margin":
        return margin(logits, labels)
    if loss == "dlr":
        if logits.shape[-1] < 3:
            raise UsageError(f"the loss 'dlr' needs 3 classes, found {logits.shape[-1]}: choose margin")
        top = logits.topk(3, dim=-1).values
        return margin(logits, labels) / (top[..., 0] - top[..., 2] + 1e-12)
    if loss == "logit":
        return -_class_logits(logits, labels)
    if loss == "uniform":
        return logits.log_softmax(dim=-1).mean(dim=-1)
    raise UsageError(f"unknown loss '{loss}': choose from {', '.join(LOSSES)}")


def exit_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each exit and sample.

    Args:
        logits: (E, B, C).
        labels: (B,) int64.
        smoothing: label smoothing in [0, 1): this share of the label is spread over all classes.

    Returns:
        (E, B) float32.
    """
    exits, rows, classes = logits.shape
    losses = F.cross_entropy(
        logits.float().reshape(-1, classes), labels.repeat(exits), reduction="none", label_smoothing=smoothing
    )
    return losses.reshape(exits, rows)


def margin(logits: Tensor, classes: Tensor) -> Tensor:
    """The largest other logit minus the logit of the given class: (E, B, C), (B,) to (E, B)."""
    index = classes.expand(len(logits), -1).unsqueeze(-1)
    others = logits.scatter(-1, index, -math.inf)
    return others.amax(dim=-1) - _class_logits(logits, classes)


def _class_logits(logits: Tensor, classes: Tensor) -> Tensor:
    """The logit of one class per sample: (E, B, C), (B,) to (E, B)."""
    return logits[:, torch.arange(len(classes), device=logits.device), classes]
