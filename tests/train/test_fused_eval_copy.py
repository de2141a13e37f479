"""The copy that attacks run on is the network; its fast layers are the plain ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mexit.attacks.losses import exit_cross_entropy
from mexit.attacks.multi_exit_attack import Attack, craft
from mexit.attacks.pgd import PGDConfig
from mexit.attacks.rng import CounterRNG
from mexit.data import digits
from mexit.models import MultiExit, build_model, model_spec
from mexit.models.msdnet_layers import Growth, unit
from mexit.train.config import TrainSettings
from mexit.train.fast_layers import BitReLU, DenseGrowth, optimise_layers
from mexit.train.fused_eval_copy import FusedEvalCopy
from mexit.train.methods import build_method
from mexit.train.methods.base import Batch
from mexit.train.precision import Precision
from mexit.train.train_step import Step

NETWORKS = ("digits-cnn", "small-cnn", "msdnet-cifar10", "resnet38", "mobilenetv2")
FEW = 8


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def real_images(name: str, count: int = FEW) -> tuple[Tensor, Tensor]:
    """Digits in the network's size: (B, C, H, W) and labels."""
    data = digits.load()
    channels, height, width = model_spec(name).input_shape
    small = torch.from_numpy(data.batch(np.arange(count), model_spec("digits-cnn").input))
    images = F.interpolate(small, size=(height, width), mode="bilinear").clamp(0, 1)
    return images.expand(-1, channels, -1, -1).contiguous(), torch.from_numpy(data.labels[:count])


def lived_in(name: str) -> MultiExit:
    """A network whose BatchNorms have seen images, with weights that are not the initial ones."""
    torch.manual_seed(0)
    network = build_model(name, 10)
    images, _ = real_images(name)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 0.5
                layer.weight.uniform_(0.7, 1.3)
                layer.bias.uniform_(-0.2, 0.2)
        network.train()(images)
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_the_copy_gives_the_logits_of_the_network_as_it_is_now(name: str) -> None:
    network = lived_in(name)
    images, _ = real_images(name)
    copy = FusedEvalCopy(network, torch.float32)
    with torch.no_grad():
        first = network.eval()(images)
        torch.testing.assert_close(copy.refreshed()(images), first, atol=2e-4, rtol=1e-4)
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.1)
        second = network(images)
        assert (second - first).abs().max() > 0.01
        torch.testing.assert_close(copy.refreshed()(images), second, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["msdnet-cifar10", "resnet38", "mobilenetv2"])
def test_no_batchnorm_behind_a_convolution_is_left(name: str) -> None:
    network = lived_in(name)
    left = [layer for layer in FusedEvalCopy(network).refreshed().modules() if isinstance(layer, nn.BatchNorm2d)]
    # In MobileNetV2's first branch two BatchNorms stand behind a block, not behind a convolution.
    assert len(left) == (2 if name == "mobilenetv2" else 0)


def test_the_copy_leaves_the_network_alone() -> None:
    network = lived_in("msdnet-cifar10")
    images, labels = real_images("msdnet-cifar10")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    attack = Attack("average", PGDConfig(0.1, 0.05, 2))
    craft(
        FusedEvalCopy(network).refreshed(), images, labels, attack, rng=CounterRNG(0, 0), index=torch.arange(FEW)
    )
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


@pytest.fixture(scope="module")
def trained() -> tuple[MultiExit, Tensor, Tensor]:
    """A network that knows something about digits, images and labels."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = build_model("digits-cnn", 10)
    images, labels = real_images("digits-cnn", 256)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(40):
        loss = exit_cross_entropy(network(images), labels).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.eval(), images, labels


@pytest.mark.parametrize("target_exits", ["average", "max-average"])
def test_an_attack_in_bfloat16_is_as_strong_judged_in_float32(trained, target_exits: str) -> None:
    network, images, labels = trained
    attack, index = Attack(target_exits, PGDConfig(0.1, 0.025, 7)), torch.arange(len(labels))

    def judged(attacked: Tensor) -> float:
        with torch.no_grad():
            return float(exit_cross_entropy(network(attacked), labels).mean())

    plain = judged(craft(network, images, labels, attack, rng=CounterRNG(0, 0), index=index))
    fast = judged(
        craft(FusedEvalCopy(network).refreshed(), images, labels, attack, rng=CounterRNG(0, 0), index=index)
    )
    assert plain > 1.3 * judged(images)
    assert fast > plain - 0.02 * (plain - judged(images))


@pytest.mark.parametrize("inplace", [False, True])
def test_bit_relu_is_relu_bit_for_bit_with_first_and_second_derivatives(inplace: bool) -> None:
    images, _ = real_images("digits-cnn")
    values = (images - 0.4).to(torch.bfloat16)
    values[0, 0, 0] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-40, -1e-40, 3e38, -3e38])
    slope = images.flip(0).to(torch.bfloat16)
    found = []
    for layer in (nn.ReLU(inplace), BitReLU(inplace)):
        start = values.clone().requires_grad_()
        upstream = slope.clone().requires_grad_()
        out = layer(start * 1)
        (first,) = torch.autograd.grad(out, start, upstream, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), upstream)
        found.append((out.abs(), first, second))  # -0 and 0 are the same
    for plain, fast in zip(*found, strict=True):
        assert torch.equal(plain, fast)
    assert found[1][2].abs().sum() > 0
    assert torch.equal(BitReLU(inplace)(images - 0.4), torch.relu(images - 0.4))


def test_dense_growth_is_growth_and_its_gradients_have_no_gaps() -> None:
    torch.manual_seed(0)
    plain = Growth(unit(16, 6), unit(8, 6, stride=2))
    fast = DenseGrowth(plain)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    dense: list[bool] = []
    plain.normal.register_full_backward_hook(
        lambda _, __, upstream: dense.append(upstream[0].is_contiguous(memory_format=torch.channels_last))
    )
    images, _ = real_images("resnet38", 4)
    coarse, finer = (
        F.avg_pool2d(images, 4).repeat(1, 6, 1, 1)[:, :16],
        F.avg_pool2d(images, 2).repeat(1, 3, 1, 1)[:, :8],
    )
    inputs = [part.contiguous(memory_format=torch.channels_last).requires_grad_() for part in (coarse, finer)]
    found = []
    for layer in (plain, fast):
        out = layer(*inputs)
        found.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert dense == [False, True]


def test_quicken_keeps_names_weights_and_results() -> None:
    network, twin = lived_in("msdnet-cifar10").eval(), lived_in("msdnet-cifar10").eval()
    optimise_layers(twin)
    assert network.state_dict().keys() == twin.state_dict().keys()
    images, _ = real_images("msdnet-cifar10", 2)
    with torch.no_grad():
        assert torch.equal(network(images), twin(images))
    kinds = {type(layer) for layer in twin.modules()}
    assert {BitReLU, DenseGrowth} <= kinds
    assert not {nn.ReLU, Growth} & kinds


@pytest.mark.parametrize("train_mode", [False, True])
def test_a_step_crafts_with_the_copy_only_in_eval_mode(train_mode: bool) -> None:
    recipe = Precision("cpu", bf16=True, channels_last=True)
    network = recipe.place(lived_in("msdnet-cifar10"))
    settings = TrainSettings(model="msdnet-cifar10", method="adversarial", craft_train_mode=train_mode, steps=1)
    images, labels = real_images("msdnet-cifar10")
    batch = Batch(
        network,
        recipe.images(images),
        labels,
        torch.arange(FEW),
        settings.training_attack(),
        CounterRNG(0, 0),
        recipe.autocast,
    )
    before = {key: value.clone() for key, value in network.named_buffers()}
    step = Step(
        network,
        build_method("adversarial", {}),
        torch.optim.SGD(network.parameters()),
        settings,
        None,
        recipe.attack_copy(network),
    )
    attacked = step.craft(batch)
    assert attacked is not None
    assert attacked.shape == (1, *images.shape)
    assert attacked.dtype == torch.float32
    # Train mode moves the statistics of the network itself; the copy has none.
    moved = any(not torch.equal(before[key], value) for key, value in network.named_buffers())
    assert moved == train_mode


def test_float32_has_no_copy_and_plain_layers() -> None:
    recipe = Precision("cpu", bf16=False, channels_last=False)
    network = recipe.place(build_model("resnet38", 10))
    assert recipe.attack_copy(network) is None
    assert BitReLU not in {type(layer) for layer in network.modules()}
