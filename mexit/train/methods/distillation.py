"""What a teacher hands on: softmax outputs at a temperature, and the losses that pull a student to them.

G. Hinton, O. Vinyals, J. Dean: distilling the knowledge in a neural network, 2015. Both sides are divided by the
same temperature T; a loss at T is multiplied by T^2 by its caller, so that its gradient keeps its size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mexit.attacks.multi_exit_attack import Autocast
from mexit.models.multi_exit import MultiExit


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over samples: logits and targets (E, B, C) to (E,)."""
    return -(targets * logits.float().log_softmax(dim=-1)).sum(dim=-1).mean(dim=-1)


def divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """KL( targets || softmax(logits) ), mean over samples: (E, B, C) each to (E,)."""
    return soft_cross_entropy(logits, targets) + torch.xlogy(targets, targets).sum(dim=-1).mean(dim=-1)


def teacher_probabilities(
    teachers: Sequence[MultiExit], images: Tensor, temperature: float, autocast: Autocast
) -> Tensor:
    """The mean over networks of the softmax at T of their last exits: images (B, C, H, W) to (B, C), detached."""
    with torch.no_grad(), autocast():
        logits = torch.stack([teacher.forward_exit(images, teacher.exits) for teacher in teachers])
    return (logits.float() / temperature).softmax(dim=-1).mean(dim=0)
