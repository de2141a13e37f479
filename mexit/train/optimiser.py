"""The optimiser of a run: SGD with momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mexit.train.config import TrainSettings


def build_optimiser(model: nn.Module, settings: TrainSettings) -> torch.optim.SGD:
    """SGD with the momentum and weight decay of the settings.

    Without `decay_norms`, parameters of one dimension (those of BatchNorm, and biases) have no weight decay.
    """
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if not settings.decay_norms:
        groups = [
            {"params": [parameter for parameter in parameters if parameter.ndim > 1]},
            {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
    return torch.optim.SGD(
        groups, settings.lr, settings.momentum, weight_decay=settings.weight_decay, nesterov=settings.nesterov
    )
