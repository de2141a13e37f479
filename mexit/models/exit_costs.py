"""MACs and parameters of every exit, counted on the torch network.

The rule is the same as for exported graphs: one multiply-add is one MAC. Convolutions and linear layers count;
biases, normalisation, activations and pooling are free. The heads of earlier exits are included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mexit.errors import MexitError
from mexit.models.multi_exit import Features, MultiExit, Normalise, Stage

COUNTED = (nn.Conv2d, nn.Linear)
FREE = (
    nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.BatchNorm2d, nn.Dropout, nn.Flatten, nn.Identity, nn.MaxPool2d,
    nn.ReLU, Normalise,
    nn.Sequential,  # only an empty one is a leaf: the trunk of a stage without layers
)  # fmt: skip


@dataclass(frozen=True)
class ExitCost:
    """Cost of one image that leaves at an exit.

    Attributes:
        macs: everything that runs up to this exit, earlier heads included.
        parameters: of the same layers.
        trunk_macs: of the trunk of this stage alone.
        head_macs: of the head of this exit alone.
    """

    macs: int
    parameters: int
    trunk_macs: int
    head_macs: int


def exit_costs(network: MultiExit) -> list[ExitCost]:
    """Cost of every exit, E entries.

    Args:
        network: on any device. On the device "meta" only shapes are computed, which needs no memory for weights.

    Raises:
        MexitError: the network has a layer of an unknown kind.
    """
    macs = _macs_of_layers(network)
    costs: list[ExitCost] = []
    total, parameters = 0, 0
    for stage in network.stages:
        assert isinstance(stage, Stage)
        trunk, head = (sum(macs.get(layer, 0) for layer in part.modules()) for part in (stage.trunk, stage.head))
        total += trunk + head
        parameters += sum(parameter.numel() for parameter in stage.parameters())
        costs.append(ExitCost(total, parameters, trunk, head))
    return costs


def _macs_of_layers(network: MultiExit) -> dict[nn.Module, int]:
    macs: dict[nn.Module, int] = {}
    was_training = network.training
    network.eval()  # BatchNorm in train mode rejects a batch of one
    try:
        with torch.no_grad(), _counting(network, macs):
            features: Features = (torch.zeros(1, *network.input_shape, device=next(network.parameters()).device),)
            for stage in network.stages:
                features, _ = stage(*features)
    finally:
        network.train(was_training)
    return macs


@contextmanager
def _counting(network: MultiExit, macs: dict[nn.Module, int]) -> Iterator[None]:
    """Register a forward hook on every leaf layer that adds its MACs to `macs`; removed on exit."""

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        macs[layer] = macs.get(layer, 0) + _layer_macs(layer, inputs[0], output)

    leaves = [layer for stage in network.stages for layer in stage.modules() if not list(layer.children())]
    handles = [layer.register_forward_hook(add) for layer in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_macs(layer: nn.Module, features: Tensor, output: Tensor) -> int:
    """MACs of one layer for one image."""
    if isinstance(layer, nn.Conv2d):
        # weight is (C_out, C_in / groups, k, k): one multiply-add per output value and weight of its channel
        return output[0].numel() * layer.weight[0].numel()
    if isinstance(layer, nn.Linear):
        return features[0].numel() // layer.in_features * layer.weight.numel()
    if isinstance(layer, FREE):
        return 0
    known = ", ".join(sorted(kind.__name__ for kind in (*COUNTED, *FREE)))
    raise MexitError(f"cannot count the MACs of a layer {type(layer).__name__}: known layers are {known}")
