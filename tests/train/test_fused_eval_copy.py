"""The fused copy for attacks computes what the network computes, and attacks on it are as strong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mexit.attacks.losses import exit_cross_entropy
from mexit.attacks.pgd import Attack, PGDConfig, craft
from mexit.attacks.rng import CounterRNG
from mexit.data import digits
from mexit.models import MultiExit, build_model, model_spec
from mexit.train.config import TrainSettings
from mexit.train.fused_eval_copy import FusedEvalCopy
from mexit.train.methods import build_method
from mexit.train.methods.base import Batch
from mexit.train.precision import Precision
from mexit.train.train_step import TrainStep

NETWORKS = ("digits-cnn", "small-cnn", "msdnet-cifar10", "resnet38", "mobilenetv2", "wide-cnn")
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


def with_statistics(name: str) -> MultiExit:
    """A network with random BatchNorm weights and running statistics of real images."""
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
def test_the_refreshed_copy_has_the_logits_of_the_network(name: str) -> None:
    network = with_statistics(name)
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


@pytest.mark.parametrize("name", ["msdnet-cifar10", "resnet38", "mobilenetv2", "wide-cnn", "wide-cnn-40m-single"])
def test_no_batchnorm_after_a_convolution_remains(name: str) -> None:
    network = with_statistics(name)
    norms = [layer for layer in FusedEvalCopy(network).refreshed().modules() if isinstance(layer, nn.BatchNorm2d)]
    # In MobileNetV2's first branch two BatchNorms follow a block, not a convolution.
    assert len(norms) == (2 if name == "mobilenetv2" else 0)


def test_attacking_the_copy_does_not_change_the_network() -> None:
    network = with_statistics("msdnet-cifar10")
    images, labels = real_images("msdnet-cifar10")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    attack = Attack("average", PGDConfig(0.1, 0.05, 2))
    craft(FusedEvalCopy(network).refreshed(), images, labels, attack, rng=CounterRNG(0, 0), index=torch.arange(FEW))
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


@pytest.fixture(scope="module")
def trained() -> tuple[MultiExit, Tensor, Tensor]:
    """A network trained on digits for 40 steps, images and labels."""
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


@pytest.mark.slow
@pytest.mark.parametrize("target_exits", ["average", "max-average"])
def test_an_attack_in_bfloat16_is_as_strong_when_evaluated_in_float32(trained, target_exits: str) -> None:
    network, images, labels = trained
    attack, index = Attack(target_exits, PGDConfig(0.1, 0.025, 7)), torch.arange(len(labels))

    def mean_loss(attacked: Tensor) -> float:
        with torch.no_grad():
            return float(exit_cross_entropy(network(attacked), labels).mean())

    plain = mean_loss(craft(network, images, labels, attack, rng=CounterRNG(0, 0), index=index))
    fast = mean_loss(
        craft(FusedEvalCopy(network).refreshed(), images, labels, attack, rng=CounterRNG(0, 0), index=index)
    )
    assert plain > 1.3 * mean_loss(images)
    assert fast > plain - 0.02 * (plain - mean_loss(images))


@pytest.mark.parametrize("train_mode", [False, True])
def test_a_step_attacks_the_copy_only_in_eval_mode(train_mode: bool) -> None:
    precision = Precision("cpu", bf16=True, channels_last=True)
    network = precision.prepare(with_statistics("msdnet-cifar10"))
    settings = TrainSettings(model="msdnet-cifar10", method="adversarial", craft_train_mode=train_mode, steps=1)
    images, labels = real_images("msdnet-cifar10")
    batch = Batch(
        network,
        precision.to_device(images),
        labels,
        torch.arange(FEW),
        settings.training_attack(),
        CounterRNG(0, 0),
        precision.autocast,
    )
    before = {key: value.clone() for key, value in network.named_buffers()}
    step = TrainStep(
        network,
        build_method("adversarial", {}),
        torch.optim.SGD(network.parameters()),
        settings,
        attack_copy=precision.attack_copy(network),
    )
    attacked = step.craft(batch)
    assert attacked is not None
    assert attacked.shape == (1, *images.shape)
    assert attacked.dtype == torch.float32
    # Train mode updates the running statistics of the network; the copy has none.
    updated = any(not torch.equal(before[key], value) for key, value in network.named_buffers())
    assert updated == train_mode


def test_training_in_float32_has_no_copy() -> None:
    assert Precision("cpu", bf16=False, channels_last=False).attack_copy(build_model("resnet38", 10)) is None
