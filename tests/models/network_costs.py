"""Costs by RDI-Nets' counting rule, for the tests of its networks."""

from __future__ import annotations

import torch
from torch import nn

from mexit.models import MultiExit, build_model

MEBI = 2**20


def convolution_millions(name: str, classes: int = 10, *, every_branch: bool = False) -> list[float]:
    """Convolution MACs of each exit in units of 2**20: the trunk up to the exit and the branch of the exit.

    `every_branch` includes the branches of earlier exits.
    """
    with torch.device("meta"):
        network = build_model(name, classes)
    macs = _convolutions(network)
    trunk, earlier, millions = 0, 0, []
    for stage in network.stages:
        trunk += sum(macs.get(layer, 0) for layer in stage.trunk.modules())
        branch = sum(macs.get(layer, 0) for layer in stage.head.modules())
        millions.append((trunk + branch + earlier) / MEBI)
        earlier += branch if every_branch else 0
    return millions


def _convolutions(network: MultiExit) -> dict[nn.Module, int]:
    macs: dict[nn.Module, int] = {}

    def add(layer: nn.Module, _: object, out: torch.Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        per_output = layer.kernel_size[0] * layer.kernel_size[1] * layer.in_channels // layer.groups
        macs[layer] = out[0].numel() * per_output

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(add)
    network.eval()(torch.zeros(1, *network.input_shape, device="meta"))
    return macs
