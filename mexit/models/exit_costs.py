"""MACs and parameters of every exit, counted on the torch network.

The rule is the same as for exported graphs: one multiply-add is one MAC. Convolutions and linear layers count;
biases, normalisation, activations and pooling are free. The heads of earlier exits are included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mexit.errors import MexitError
from mexit.models.multi_exit import Features, MultiExit, Stage


@dataclass(frozen=True)
class ExitCost:
    """Cost of one image that leaves at an exit.

    Attributes:
        macs: everything that runs up to this exit, earlier heads included.
        head_macs: the head of this exit alone.
        parameters: of the layers up to this exit, earlier heads included.
    """

    macs: int
    head_macs: int
    parameters: int


def exit_costs(network: MultiExit) -> list[ExitCost]:
    """Cost of every exit, E entries.

    On the device "meta" only shapes are computed, which needs no memory for weights. The mode of the network is kept.

    Raises:
        MexitError: the network has weights in a layer of an unknown kind.
    """
    macs, parameters, was_training, costs = 0, 0, network.training, []

    def add(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        if isinstance(layer, nn.Conv2d | nn.Linear):
            macs += output[0].numel() * layer.weight[0].numel()  # each output value takes one row of the weights
        elif not isinstance(layer, nn.BatchNorm2d):
            raise MexitError(f"cannot count the MACs of a layer {type(layer).__name__}")

    layers = [layer for layer in network.modules() if any(True for _ in layer.parameters(recurse=False))]
    handles = [layer.register_forward_hook(add) for layer in layers]
    features: Features = (torch.zeros(1, *network.input_shape, device=next(network.parameters()).device),)
    network.eval()  # BatchNorm in train mode rejects a batch of one
    try:
        with torch.no_grad():
            for stage in network.stages:
                features = cast("Stage", stage).forward_trunk(features)
                trunk_macs = macs
                cast("Stage", stage).head(*features)
                parameters += sum(parameter.numel() for parameter in stage.parameters())
                costs.append(ExitCost(macs, macs - trunk_macs, parameters))
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()
    return costs
