"""Knowledge distillation: a teacher's probabilities at a temperature, and the losses of a student against them.

G. Hinton, O. Vinyals, J. Dean: distilling the knowledge in a neural network, 2015. Teacher and student are divided
by the same temperature T. The caller multiplies the loss by T^2, so that its gradient keeps its size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mexit.train.methods.base import Setup


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with probabilities as targets, mean over samples.

    Args:
        logits: of the student, (E, B, C).
        targets: of the teacher, broadcastable to (E, B, C).

    Returns:
        (E,) float32.
    """
    return -(targets * logits.float().log_softmax(dim=-1)).sum(dim=-1).mean(dim=-1)


def kl_divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """KL( targets || softmax(logits) ), mean over samples; arguments and result as in `soft_cross_entropy`."""
    return soft_cross_entropy(logits, targets) + torch.xlogy(targets, targets).sum(dim=-1).mean(dim=-1)


def teacher_probabilities(run: Setup, images: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """The teacher's probabilities at T, detached.

    Args:
        run: its teachers are those of `--teacher`: then the mean over their last exits' softmax.
        images: (B, C, H, W), the input of these teachers.
        logits: of the student, (E, B, C); without other teachers its last exit is the teacher.
        temperature: T.

    Returns:
        (B, C) float32.
    """
    if not run.teachers:
        return (logits[-1].detach() / temperature).softmax(dim=-1)
    with torch.no_grad(), run.autocast():
        teachers = torch.stack([teacher.forward_exit(images, teacher.exits) for teacher in run.teachers])
    return (teachers.float() / temperature).softmax(dim=-1).mean(dim=0)
