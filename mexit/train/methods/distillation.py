"""Knowledge distillation: a teacher's probabilities at a temperature, and the losses of a student against them.

G. Hinton, O. Vinyals, J. Dean: distilling the knowledge in a neural network, 2015. Teacher and student are divided
by the same temperature T. The caller multiplies the loss by T^2, so that its gradient keeps its size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mexit.attacks.multi_exit_attack import Autocast
from mexit.models.multi_exit import MultiExit


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


def teacher_probabilities(
    teachers: Sequence[MultiExit], images: Tensor, temperature: float, autocast: Autocast
) -> Tensor:
    """The mean over teachers of the softmax at T of their last exits: images (B, C, H, W) to (B, C), detached."""
    with torch.no_grad(), autocast():
        logits = torch.stack([teacher.forward_exit(images, teacher.exits) for teacher in teachers])
    return (logits.float() / temperature).softmax(dim=-1).mean(dim=0)
