"""What each exit costs, counted on the network itself: shapes only, so that the largest takes a second.

The same rule as the count on exported graphs: one multiply-add is one MAC; convolutions and linear layers count,
biases, normalisation, activations and pooling are free; the heads that were passed on the way are included. A
kind of layer that is in neither table is an error: a cost is never guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mexit.errors import MexitError
from mexit.models.multi_exit import Features, MultiExit, Stage
from mexit.models.normalise import Normalise

# An empty Sequential is a trunk without layers; one with layers is counted by them.
COUNTED = (nn.Conv2d, nn.Linear)
FREE = (
    nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.BatchNorm2d, nn.Dropout, nn.Flatten, nn.Identity, nn.MaxPool2d,
    nn.ReLU, nn.Sequential, Normalise,
)  # fmt: skip


@dataclass(frozen=True)
class ExitCost:
    """Of one sample that leaves at an exit.

    Attributes:
        macs: everything that ran, earlier heads included.
        parameters: of everything that ran.
        trunk_macs: what this stage's trunk adds.
        head_macs: what this exit's head adds.
    """

    macs: int
    parameters: int
    trunk_macs: int
    head_macs: int


def count(network: MultiExit) -> list[ExitCost]:
    """The cost of every exit, (E,). On torch's device "meta" nothing is computed and no memory is taken."""
    macs = _macs_of_layers(network)
    costs: list[ExitCost] = []
    for stage in network.stages:
        assert isinstance(stage, Stage)
        trunk, head = (sum(macs.get(layer, 0) for layer in part.modules()) for part in (stage.trunk, stage.head))
        before = costs[-1] if costs else ExitCost(0, 0, 0, 0)
        size = sum(parameter.numel() for parameter in stage.parameters())
        costs.append(ExitCost(before.macs + trunk + head, before.parameters + size, trunk, head))
    return costs


def _macs_of_layers(network: MultiExit) -> dict[nn.Module, int]:
    macs: dict[nn.Module, int] = {}
    was_training = network.training
    network.eval()  # BatchNorm in train mode refuses a single row
    try:
        with torch.no_grad(), _counting(network, macs):
            carried: Features = (torch.zeros(1, *network.input_shape, device=next(network.parameters()).device),)
            for stage in network.stages:
                carried, _ = stage(*carried)
    finally:
        network.train(was_training)
    return macs


@contextmanager
def _counting(network: MultiExit, macs: dict[nn.Module, int]) -> Iterator[None]:
    """Hooks on every leaf that note its MACs, gone afterwards."""

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        macs[layer] = macs.get(layer, 0) + _layer_macs(layer, inputs[0], output)

    leaves = [layer for stage in network.stages for layer in stage.modules() if not list(layer.children())]
    handles = [layer.register_forward_hook(note) for layer in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_macs(layer: nn.Module, features: Tensor, output: Tensor) -> int:
    """MACs of one layer for one row."""
    if isinstance(layer, nn.Conv2d):
        # Weights are (C_out, C_in / groups, k, k): every output value costs one product a weight of its channel.
        return output[0].numel() * layer.weight[0].numel()
    if isinstance(layer, nn.Linear):
        return features[0].numel() // layer.in_features * layer.weight.numel()
    if isinstance(layer, FREE):
        return 0
    known = ", ".join(sorted(kind.__name__ for kind in (*COUNTED, *FREE)))
    raise MexitError(f"cannot count the cost of a layer {type(layer).__name__}: known are {known}")
