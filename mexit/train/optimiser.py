"""The optimiser of a run: SGD with momentum, with a learning rate of its own for the heads of a pretrained network."""

from __future__ import annotations

from typing import Any, cast

import torch

from mexit.models.multi_exit import MultiExit, Stage
from mexit.train.config import TrainSettings
from mexit.train.presets import FINETUNE, ROBUST_FINETUNE

# Factor of the learning rate of the heads in a run that starts from a frozen network. They start at their optimum, and
# one step changes their logits by the rate times the number of features, which have unit variance.
HEAD_RATE = 0.1
# Factor for heads that start at random on a pretrained backbone: ten times its rate, as is usual in fine-tuning.
NEW_HEAD_RATE = 10.0


def build_optimiser(model: MultiExit, settings: TrainSettings) -> torch.optim.SGD:
    """SGD with the momentum and weight decay of the settings.

    Without `decay_norms`, parameters of one dimension (those of BatchNorm, and biases) have no weight decay. The entry
    `rate` of a group of parameters is the factor of its learning rate, see `set_lr`.
    """
    groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "rate": 1.0}]
    if settings.freeze or settings.preset in (FINETUNE, ROBUST_FINETUNE):
        heads = [parameter for stage in model.stages for parameter in cast("Stage", stage).head.parameters()]
        of_heads = {id(parameter) for parameter in heads}
        backbone = [parameter for parameter in model.parameters() if id(parameter) not in of_heads]
        rate = HEAD_RATE if settings.freeze else NEW_HEAD_RATE
        groups = [{"params": backbone, "rate": 1.0}, {"params": heads, "rate": rate}]
    if not settings.decay_norms:
        groups = [part for group in groups for part in _without_decay_of_norms(group)]
    optimiser = torch.optim.SGD(
        groups, settings.lr, settings.momentum, weight_decay=settings.weight_decay, nesterov=settings.nesterov
    )
    set_lr(optimiser, settings.lr)
    return optimiser


def set_lr(optimiser: torch.optim.SGD, lr: float) -> None:
    """Set the learning rate of every group of parameters: `lr` times the group's factor."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group["rate"]


def _without_decay_of_norms(group: dict[str, Any]) -> list[dict[str, Any]]:
    parameters = group["params"]
    return [
        group | {"params": [parameter for parameter in parameters if parameter.ndim > 1]},
        group | {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
