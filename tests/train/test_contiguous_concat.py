"""`ContiguousGrowth` computes what `Growth` computes, with contiguous gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from mexit.models import build_model
from mexit.models.msdnet_layers import Growth, unit
from mexit.train.contiguous_concat import ContiguousGrowth, make_gradients_contiguous
from mexit.train.precision import Precision


def layer_types(network: torch.nn.Module) -> set[type]:
    return {type(layer) for layer in network.modules()}


def test_values_and_gradients_are_those_of_growth_and_gradients_are_contiguous() -> None:
    torch.manual_seed(0)
    growth = Growth(unit(16, 6), unit(8, 6, stride=2))
    contiguous = ContiguousGrowth(growth)
    assert contiguous.state_dict().keys() == growth.state_dict().keys()
    is_contiguous: list[bool] = []
    growth.normal.register_full_backward_hook(
        lambda _, __, upstream: is_contiguous.append(upstream[0].is_contiguous(memory_format=torch.channels_last))
    )
    coarse, finer = torch.rand(4, 16, 8, 8), torch.rand(4, 8, 16, 16)
    inputs = [part.contiguous(memory_format=torch.channels_last).requires_grad_() for part in (coarse, finer)]
    results: list[tuple[Tensor, ...]] = []
    for layer in (growth, contiguous):
        out = layer(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    assert is_contiguous == [False, True]


def test_a_converted_network_keeps_its_names_and_logits() -> None:
    torch.manual_seed(0)
    network = build_model("msdnet-cifar10", 10).eval()
    converted = build_model("msdnet-cifar10", 10).eval()
    converted.load_state_dict(network.state_dict())
    make_gradients_contiguous(converted)
    assert network.state_dict().keys() == converted.state_dict().keys()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(images), converted(images))
    assert ContiguousGrowth in layer_types(converted)
    assert Growth not in layer_types(converted)


def test_only_bfloat16_training_on_the_cpu_converts_a_network() -> None:
    plain = Precision("cpu", bf16=False, channels_last=False).prepare(build_model("msdnet-cifar10", 10))
    assert ContiguousGrowth not in layer_types(plain)
    fast = Precision("cpu", bf16=True, channels_last=True).prepare(build_model("msdnet-cifar10", 10))
    assert Growth not in layer_types(fast)
