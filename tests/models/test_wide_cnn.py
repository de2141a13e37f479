"""WideCNN has the costs it is documented with, one tensor at each cut, and normalises its pixels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mexit.export.segments import cut_segments
from mexit.models import build_model, registry
from mexit.models.exit_costs import exit_costs

# By hand, with widths a, b, c: the stem, a strided convolution and two convolutions of each stage, the heads.
MACS = {
    "wide-cnn": [
        9 * 3 * 32 * 1024 + (9 * 32 * 64 + 2 * 9 * 64 * 64) * 256 + 640,
        (9 * 64 * 128 + 2 * 9 * 128 * 128) * 64 + 1280,
        (9 * 128 * 256 + 2 * 9 * 256 * 256) * 16 + 2560,
    ],
    "wide-cnn-20m": [
        9 * 3 * 16 * 1024 + (9 * 16 * 32 + 2 * 9 * 32 * 32) * 256 + 320,
        (9 * 32 * 64 + 2 * 9 * 64 * 64) * 64 + 640,
        (9 * 64 * 128 + 2 * 9 * 128 * 128) * 16 + 1280,
    ],
    "wide-cnn-10m": [
        9 * 3 * 16 * 1024 + (9 * 16 * 24 + 2 * 9 * 24 * 24) * 256 + 240,
        (9 * 24 * 48 + 2 * 9 * 48 * 48) * 64 + 480,
        (9 * 48 * 96 + 2 * 9 * 96 * 96) * 16 + 960,
    ],
    "wide-cnn-40m": [
        9 * 3 * 32 * 1024 + (9 * 32 * 48 + 2 * 9 * 48 * 48) * 256 + 480,
        (9 * 48 * 96 + 2 * 9 * 96 * 96) * 64 + 960,
        (9 * 96 * 192 + 2 * 9 * 192 * 192) * 16 + 1920,
    ],
}


@pytest.mark.parametrize(
    ("name", "millions", "parameters"),
    [
        ("wide-cnn", [24.5, 48.1, 71.7], 1_943_486),
        ("wide-cnn-40m", [15.0, 28.3, 41.6], 1_098_430),
        ("wide-cnn-20m", [6.3, 12.2, 18.1], 487_918),
        ("wide-cnn-10m", [4.0, 7.3, 10.6], 276_206),
    ],
)
def test_costs_of_every_exit(name: str, millions: list[float], parameters: int) -> None:
    with torch.device("meta"):
        costs = exit_costs(build_model(name, 10))
    by_hand = [sum(MACS[name][:k]) for k in (1, 2, 3)]
    assert [cost.macs for cost in costs] == by_hand
    assert [round(cost.macs / 1e6, 1) for cost in costs] == millions
    assert costs[-1].parameters == parameters


@pytest.mark.parametrize("name", MACS)
def test_the_single_exit_network_costs_the_heads_of_the_early_exits_less(name: str) -> None:
    with torch.device("meta"):
        costs, (alone,) = (exit_costs(build_model(kind, 10)) for kind in (name, f"{name}-single"))
        heads = [stage.head[-1].weight.numel() for stage in build_model(name, 10).stages]
    assert alone.macs == costs[-1].macs - heads[0] - heads[1]


@pytest.mark.parametrize("name", MACS)
def test_one_tensor_is_carried_over_each_cut(name: str) -> None:
    torch.set_num_threads(1)
    first, second, third = cut_segments(build_model(name, 10))
    a, b = {"wide-cnn": (64, 128), "wide-cnn-40m": (48, 96), "wide-cnn-20m": (32, 64), "wide-cnn-10m": (24, 48)}[name]
    assert (first.inputs, first.outputs) == (("input",), ("features_1_1", "logits_1"))
    assert (second.inputs, second.outputs) == (("features_1_1",), ("features_2_1", "logits_2"))
    assert (third.inputs, third.outputs) == (("features_2_1",), ("logits_3",))
    assert [tuple(tensor.shape[1:]) for tensor in (*second.example, *third.example)] == [(a, 16, 16), (b, 8, 8)]


def test_pixels_are_normalised_inside_the_network() -> None:
    normalise = build_model("wide-cnn", 10).normalise
    mean, std = torch.tensor(registry.MSDNET_CIFAR10.mean), torch.tensor(registry.MSDNET_CIFAR10.std)
    pixels = (mean + 2 * std).reshape(1, 3, 1, 1).expand(1, 3, 32, 32)
    torch.testing.assert_close(normalise(pixels), torch.full((1, 3, 32, 32), 2.0))


def test_initialisation_and_gradients() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = build_model("wide-cnn", 10)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 9000:
            expected = (2 / (9 * layer.out_channels)) ** 0.5
            assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=0.05)
    network(torch.rand(2, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
