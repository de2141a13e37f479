"""MSDNet is the published network: its costs and parameters at every exit are those of the public port."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mexit.errors import UsageError
from mexit.models.exit_costs import exit_costs
from mexit.models.msdnet import Growth, MSDNetConfig, layer_shapes, make_gradients_contiguous, unit
from mexit.models.msdnet import build as build_msdnet
from mexit.models.multi_exit import Normalise
from mexit.models.registry import MSDNET_CIFAR10, MSDNET_CIFAR100, MSDNET_IMAGENET, build_model

FOUR = {"growth_factors": (1, 2, 4, 4), "bottleneck_factors": (1, 2, 4, 4)}
WIDE = {**FOUR, "channels": 32, "growth": 16}
IMAGENET = {**WIDE, "stem": 4, "head_width": None, "input_shape": (3, 224, 224)}
TINY = {"input_shape": (3, 64, 64)}

# The port's own count in millions per exit, with ReLU, pooling and bias operations, and the parameters in millions
# where they are known.
TABLE = {
    "cifar-100, 7 exits, base 4 step 2": (
        MSDNetConfig(blocks=7, base=4, step=2), 100,
        [15.14, 25.51, 37.10, 46.33, 57.34, 66.96, 75.94], [0.434, 0.877, 1.275, 1.696, 2.178, 2.603, 3.068],
    ),
    "cifar-100, 11 exits, base 4 step 2": (
        MSDNetConfig(blocks=11, base=4, step=2), 100,
        [15.14, 25.51, 37.79, 52.06, 62.18, 74.07, 87.73, 100.04, 110.12, 121.68, 134.71], [..., 5.598],
    ),
    "cifar-10, 3 exits, base 4 step 2": (
        MSDNetConfig(blocks=3, base=4, step=2), 10, [14.76, 21.77, 27.67], [0.346, 0.677, 0.991],
    ),
    "cifar-10, 3 exits, base 2 step 2": (
        MSDNetConfig(blocks=3, base=2, step=2), 10, [9.35, 16.45, 20.99], [0.331, 0.630, 0.907],
    ),
    "cifar-10, 3 exits, base 4 step 4": (
        MSDNetConfig(blocks=3, base=4, step=4), 10, [15.13, 29.93, 42.23], [0.422, 0.859, 1.327],
    ),
    "imagenet, base 4 step 4": (
        MSDNetConfig(blocks=5, base=4, step=4, **IMAGENET), 1000,
        [339.90, 685.46, 1008.16, 1254.47, 1360.53], [4.24, 8.77, 13.07, 16.75, 23.96],
    ),
    "imagenet, base 6 step 6": (
        MSDNetConfig(blocks=5, base=6, step=6, **IMAGENET), 1000,
        [514.66, 1171.18, 1844.52, 2501.40, 2742.06], [..., 56.5],
    ),
    "imagenet, base 7 step 7": (
        MSDNetConfig(blocks=5, base=7, step=7, **IMAGENET), 1000,
        [615.69, 1436.39, 2283.21, 2967.42, 3253.79], [..., 62.3],
    ),
    "tiny-imagenet, 4 scales, wide": (
        MSDNetConfig(blocks=5, base=4, step=4, head_width=None, **WIDE, **TINY), 200,
        [360.3, 803.1, 1217.3, 1533.6, 1654.3], [...],
    ),
    "tiny-imagenet, 4 scales": (
        MSDNetConfig(blocks=5, base=4, step=2, **FOUR, **TINY), 200, [64.9, 88.3, 109.9, 125.1, 131.2], [...],
    ),
    "tiny-imagenet, stride 2, 3 scales": (
        MSDNetConfig(blocks=5, base=4, step=2, stem=2, **TINY), 200, [15.15, 24.37, 32.73, 39.94, 47.82], [...],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_costs_and_parameters_per_exit_are_the_published_ones(row) -> None:
    config, classes, millions, sizes = row
    with torch.device("meta"):
        network = build_msdnet(config, classes)
    digits = max(len(str(value).partition(".")[2]) for value in millions)
    assert [cost / 1e6 for cost in port_operations(network)] == pytest.approx(millions, abs=0.51 * 10**-digits)
    costs = exit_costs(network)
    # Convolutions and linear layers alone: about 1 % less than with ReLU, pooling and biases.
    assert [cost.macs / 1e6 for cost in costs] == pytest.approx(millions, rel=0.02)
    parameters = [cost.parameters / 1e6 for cost in costs]
    if len(sizes) != len(parameters):  # only the first or the last are known
        known = [0] if sizes[0] is not ... else []
        known += [-1] if sizes[-1] is not ... else []
        parameters, sizes = [parameters[k] for k in known], [sizes[k] for k in known]
    assert parameters == pytest.approx(sizes, abs=0.06 if sizes and sizes[-1] > 50 else 0.006)


def port_operations(network) -> list[int]:
    """Operations by the port's rule: one per output for a bias and a ReLU, one per input of each pooling window."""
    operations_of: list[tuple[nn.Module, int]] = []

    def add(layer: nn.Module, _: object, out: torch.Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            operations_of.append((layer, out.numel() * layer.weight[0].numel()))
        elif isinstance(layer, nn.ReLU):
            operations_of.append((layer, out.numel()))
        elif isinstance(layer, nn.AvgPool2d | nn.MaxPool2d):
            operations_of.append((layer, out.numel() * layer.kernel_size**2))
        elif isinstance(layer, nn.Linear):
            operations_of.append((layer, layer.weight.numel() + layer.bias.numel()))

    handles = [layer.register_forward_hook(add) for layer in network.modules()]
    network.eval()(torch.zeros(1, *network.input_shape, device="meta"))
    for handle in handles:
        handle.remove()
    total, per_exit = 0, []
    for layer, operations in operations_of:
        total += operations
        if isinstance(layer, nn.Linear):
            per_exit.append(total)
    return per_exit


def test_registered_networks_are_rows_of_the_table() -> None:
    for config, row in (
        (MSDNET_CIFAR10, "cifar-10, 3 exits, base 2 step 2"),
        (MSDNET_CIFAR100, "cifar-100, 7 exits, base 4 step 2"),
        (MSDNET_IMAGENET, "imagenet, base 4 step 4"),
    ):
        assert layer_shapes(config) == layer_shapes(TABLE[row][0])
        assert (config.stem, config.head_width) == (TABLE[row][0].stem, TABLE[row][0].head_width)


def test_the_fine_scales_end_evenly_over_the_depth() -> None:
    widest = [[layer.scales_out for layer in block] for block in layer_shapes(MSDNET_CIFAR10)]
    assert widest == [[3, 3], [2, 2], [1, 1]]


def test_carried_features_are_the_remaining_scales() -> None:
    torch.set_num_threads(1)
    network = build_model("msdnet-cifar10", 10).eval()
    carried: tuple[torch.Tensor, ...] = (network.normalise(torch.rand(2, 3, 32, 32)),)
    shapes = []
    for stage in network.stages:
        carried, logits = stage(*carried)
        shapes.append([tuple(scale.shape[1:]) for scale in carried])
        assert logits.shape == (2, 10)
    # unit channels: 16 + 6 + 6, then (28 + 6) / 2 + 6, then (23 + 6) // 2 + 6; times 1, 2 and 4
    assert shapes == [
        [(28, 32, 32), (56, 16, 16), (112, 8, 8)],
        [(46, 16, 16), (92, 8, 8)],
        [(80, 8, 8)],
    ]


@pytest.mark.parametrize("change", [{"reduction": 0.0}, {"bottleneck_factors": None}], ids=str)
def test_every_switch_gives_a_network_that_trains(change) -> None:
    torch.set_num_threads(1)
    network = build_msdnet(MSDNetConfig(**{"blocks": 3, "base": 2, "step": 2} | change), 5)
    logits = network(torch.rand(2, 3, 32, 32))
    assert logits.shape == (3, 2, 5)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters()), "a path has no effect"


def test_initialisation_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    network = build_model("msdnet-cifar10", 10)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 20_000:
            expected = (2 / (layer.kernel_size[0] ** 2 * layer.out_channels)) ** 0.5
            assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=0.05)
        elif isinstance(layer, nn.Linear):
            assert not layer.bias.any()


def test_the_network_normalises_pixels() -> None:
    normalise = build_model("msdnet-cifar100", 100).normalise
    assert isinstance(normalise, Normalise)
    images = torch.tensor([0.5071, 0.4867, 0.4408]).reshape(1, 3, 1, 1).expand(1, 3, 32, 32)
    assert normalise(images).abs().max() < 1e-6
    shifted = normalise(images + torch.tensor([0.2675, 0.2565, 0.2761]).reshape(1, 3, 1, 1))
    torch.testing.assert_close(shifted, torch.ones_like(shifted))
    assert set(normalise.state_dict()) == {"mean", "std"}
    assert not list(normalise.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stem": 3}, "1, 2, 4"),
        ({"base": 0}, "at least 1"),
        ({"bottleneck_factors": (1, 2)}, "3 scales"),
        ({"growth": 5, "growth_factors": (1, 1, 2)}, "make it even"),
        ({"input_shape": (3, 64, 64)}, "64 pixels leave 16"),
        ({"stem": 4}, "32 pixels leave 2"),
    ],
    ids=str,
)
def test_impossible_architectures_are_refused(change, message) -> None:
    with pytest.raises(UsageError, match=message):
        MSDNetConfig(**{"blocks": 3, "base": 2, "step": 2} | change)


def test_contiguous_gradients_change_neither_values_nor_gradients() -> None:
    torch.manual_seed(0)
    growth = Growth(unit(16, 6), unit(8, 6, stride=2))
    is_contiguous: list[bool] = []
    growth.normal.register_full_backward_hook(
        lambda _, __, upstream: is_contiguous.append(upstream[0].is_contiguous(memory_format=torch.channels_last))
    )
    coarse, finer = torch.rand(4, 16, 8, 8), torch.rand(4, 8, 16, 16)
    inputs = [part.contiguous(memory_format=torch.channels_last).requires_grad_() for part in (coarse, finer)]
    results: list[tuple[Tensor, ...]] = []
    for contiguous in (False, True):
        growth.contiguous_gradients = contiguous
        out = growth(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    assert is_contiguous == [False, True]


def test_every_layer_of_a_network_gets_contiguous_gradients() -> None:
    network = build_model("msdnet-cifar10", 10)
    make_gradients_contiguous(network)
    assert {layer.contiguous_gradients for layer in network.modules() if isinstance(layer, Growth)} == {True}
