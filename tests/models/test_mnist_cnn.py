"""MnistCNN costs at most what SmallCNN costs at every exit, and its heads are nonlinear."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from mexit.export.segments import cut_segments
from mexit.models import build_model
from mexit.models.exit_costs import exit_costs

# By hand: (trunk, head) of each stage.
BY_HAND = [
    (9 * 16 * 784, 16 * 9 * 32 * 49 + 32 * 9 * 32 * 49 + 32 * 49 * 128 + 1280),
    (16 * 9 * 64 * 196 + 2 * 64 * 9 * 64 * 49, 64 * 49 * 128 + 1280),
    (64 * 9 * 96 * 49, 96 * 49 * 200 + 2000),
]


def test_every_exit_costs_at_most_what_it_costs_in_small_cnn() -> None:
    with torch.device("meta"):
        costs, small = (exit_costs(build_model(name, 10)) for name in ("mnist-cnn", "small-cnn"))
    assert [cost.macs for cost in costs] == [sum(map(sum, BY_HAND[:k])) for k in (1, 2, 3)]
    assert all(ours.macs <= theirs.macs for ours, theirs in zip(costs, small, strict=True))


def test_one_tensor_is_carried_over_each_cut() -> None:
    torch.set_num_threads(1)
    _, second, third = cut_segments(build_model("mnist-cnn", 10))
    assert [tuple(tensor.shape[1:]) for tensor in (*second.example, *third.example)] == [(16, 14, 14), (64, 7, 7)]


def test_an_activation_follows_every_weighted_layer_but_the_classifiers() -> None:
    for stage in build_model("mnist-cnn", 10).stages:
        layers = [*stage.trunk, *stage.head]
        weighted = [position for position, layer in enumerate(layers) if isinstance(layer, nn.Conv2d | nn.Linear)]
        assert weighted[-1] == len(layers) - 1
        assert not layers[-1].weight.any()
        for start, stop in pairwise(weighted):
            assert any(isinstance(layer, nn.ReLU) for layer in layers[start:stop])


def test_gradients_reach_every_parameter_after_the_first_step() -> None:
    torch.set_num_threads(1)
    network = build_model("mnist-cnn", 10)
    for stage in network.stages:
        nn.init.ones_(stage.head[-1].weight)
    network(torch.rand(2, 1, 28, 28)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
