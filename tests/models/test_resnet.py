"""RDI-ResNet has the costs, branches and shapes of RDI-Nets' code."""

from __future__ import annotations

import pytest
import torch
from network_costs import convolution_millions
from torch import nn

from mexit.errors import UsageError
from mexit.models import build_model, resnet
from mexit.models.exit_costs import exit_costs


def test_costs_are_the_table_of_rdi_nets() -> None:
    """Convolutions / 2**20, own branch only; the published table rounds the same numbers down."""
    millions = convolution_millions("resnet38")
    assert [round(value, 2) for value in millions] == [16.80, 30.30, 36.55, 50.05, 61.42, 74.92, 79.42]


def test_our_costs_include_every_earlier_branch() -> None:
    millions = convolution_millions("resnet38", every_branch=True)
    assert [round(value, 2) for value in millions] == [16.80, 37.67, 51.30, 65.92, 78.42, 91.92, 96.42]
    with torch.device("meta"):
        costs = exit_costs(build_model("resnet38", 10))
    linears = [320, 640, 960, 1280, 1920, 2560, 3200]
    assert [cost.macs - linear for cost, linear in zip(costs, linears, strict=True)] == [
        round(value * 2**20) for value in millions
    ]


def test_the_single_exit_network_costs_what_the_last_exit_does_without_branches() -> None:
    (alone,) = convolution_millions("resnet38-single")
    assert alone == convolution_millions("resnet38")[-1]


def test_exits_follow_a_quarter_and_three_quarters_of_each_group() -> None:
    network = build_model("resnet38", 10)
    blocks = [sum(isinstance(layer, resnet.BasicBlock) for layer in stage.trunk) for stage in network.stages]
    assert blocks == [2, 3, 3, 3, 3, 3, 1]
    weighted = [layer for stage in network.stages for layer in stage.trunk.modules() if isinstance(layer, nn.Conv2d)]
    three = [layer for layer in weighted if layer.kernel_size == (3, 3)]
    assert len(three) + 1 == 38, "6n + 2 layers: 37 convolutions and the last linear layer"
    assert len(weighted) - len(three) == 2, "shortcuts are convolutions where the size changes, and only there"


def test_carried_features_and_logits() -> None:
    torch.set_num_threads(1)
    network = build_model("resnet38", 10).eval()
    carried = (torch.rand(2, 3, 32, 32),)
    shapes = []
    with torch.no_grad():
        for stage in network.stages:
            carried, logits = stage(*carried)
            assert logits.shape == (2, 10)
            shapes.append(tuple(carried[0].shape[1:]))
    assert shapes == [(16, 32, 32)] * 2 + [(32, 16, 16)] * 2 + [(64, 8, 8)] * 3


def test_branches_of_the_first_group_end_without_a_relu() -> None:
    head = build_model("resnet38", 10).stages[0].head
    kinds = [type(layer).__name__ for layer in head]
    assert kinds == [
        "MaxPool2d", "Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "Conv2d", "BatchNorm2d",
        "AvgPool2d", "Flatten", "Linear",
    ]  # fmt: skip
    assert (head[1].kernel_size, head[1].out_channels, head[5].out_channels) == ((5, 5), 64, 32)
    assert head[1].bias is None


@pytest.mark.parametrize("n", [2, 12])
def test_other_depths_of_the_family(n) -> None:
    with torch.device("meta"):
        network = resnet.build(10, n)
    assert network.exits == 7
    costs = [cost.macs for cost in exit_costs(network)]
    assert costs == sorted(costs)
    three = sum(
        isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)
        for stage in network.stages
        for layer in stage.trunk.modules()
    )
    assert three + 1 == 6 * n + 2


def test_a_group_too_short_for_two_exits_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 2 blocks, found 1"):
        resnet.build(10, 1)


def test_initialisation_and_gradients() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = build_model("resnet38", 10)
    wide = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 9000]
    for layer in wide:
        expected = (2 / (layer.kernel_size[0] ** 2 * layer.out_channels)) ** 0.5
        assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=0.05)
    network(torch.rand(2, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
