"""RDI-MobileNetV2 has the costs, branches and shapes of RDI-Nets' code."""

from __future__ import annotations

import torch
from network_costs import convolution_millions
from torch import nn

from mexit.models import build_model, mobilenetv2
from mexit.models.exit_costs import exit_costs
from mexit.models.mobilenetv2 import InvertedResidual


def test_costs_follow_the_rule_of_rdi_nets() -> None:
    millions = convolution_millions("mobilenetv2")
    assert [round(value, 2) for value in millions] == [7.94, 22.91, 30.12, 36.55, 51.16, 67.91, 86.92]


def test_the_single_exit_network_costs_what_the_last_exit_does_without_branches() -> None:
    (alone,) = convolution_millions("mobilenetv2-single")
    assert alone == convolution_millions("mobilenetv2")[-1]


def test_exits_follow_layers_2_5_8_10_13_and_16_of_19() -> None:
    assert [len(stage.trunk) for stage in build_model("mobilenetv2", 10).stages] == [2, 3, 3, 2, 3, 3, 3]


def test_carried_features_and_logits() -> None:
    torch.set_num_threads(1)
    network = build_model("mobilenetv2", 10).eval()
    carried = (torch.rand(2, 3, 32, 32),)
    shapes = []
    with torch.no_grad():
        for stage in network.stages:
            carried, logits = stage(*carried)
            assert logits.shape == (2, 10)
            shapes.append(tuple(carried[0].shape[1:]))
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8), (64, 8, 8), (96, 8, 8), (160, 4, 4), (1280, 4, 4)]


def test_every_block_of_stride_1_has_a_shortcut() -> None:
    assert InvertedResidual(8, 8, 6, 2).shortcut is None
    assert isinstance(InvertedResidual(8, 8, 6, 1).shortcut, nn.Identity)
    widening = InvertedResidual(8, 16, 6, 1).shortcut
    assert isinstance(widening, nn.Sequential)
    assert isinstance(widening[0], nn.Conv2d)
    block = InvertedResidual(4, 4, 6, 1).eval()
    nn.init.zeros_(block.body[-1].weight)  # the projection's BatchNorm: the body now gives zero
    features = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(block(features), features)  # no activation behind the sum


def test_the_first_branch_has_batch_norms_of_its_own() -> None:
    kinds = [type(layer).__name__ for layer in build_model("mobilenetv2", 10).stages[0].head]
    assert kinds == [
        "InvertedResidual", "BatchNorm2d", "ReLU", "InvertedResidual", "BatchNorm2d",
        "AvgPool2d", "Flatten", "Linear",
    ]  # fmt: skip


def test_a_smaller_width_costs_less_at_every_exit() -> None:
    with torch.device("meta"):
        narrow, wide = (exit_costs(mobilenetv2.build(10, width)) for width in (0.75, 1.0))
    assert all(small.macs < large.macs for small, large in zip(narrow, wide, strict=True))
    assert len(narrow) == 7


def test_gradients_reach_every_parameter() -> None:
    torch.set_num_threads(1)
    network = build_model("mobilenetv2", 10)
    network(torch.rand(2, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
