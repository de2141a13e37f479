"""The container runs any prefix of its stages, and gives the static network of the same backbone."""

from __future__ import annotations

import pytest
import torch

from mexit.models import MODELS, build_model
from mexit.models.exit_costs import exit_costs
from mexit.models.multi_exit import keep_exits, single_exit


@pytest.mark.slow
def test_the_logits_of_one_exit_equal_those_of_the_forward_pass() -> None:
    torch.set_num_threads(1)
    for name, spec in MODELS.items():
        model = build_model(name, 7).eval()
        images = torch.rand(2, *spec.input_shape)
        with torch.no_grad():
            logits = model(images)
            assert logits.shape == (spec.exits, 2, 7)
            for k in {1, spec.exits}:
                torch.testing.assert_close(model.forward_exit(images, k), logits[k - 1])


def test_forward_exit_runs_neither_later_layers_nor_other_heads() -> None:
    model = build_model("digits-cnn", 10)
    ran = []
    for k, stage in enumerate(model.stages, start=1):
        stage.trunk.register_forward_hook(lambda *_, k=k: ran.append(f"trunk {k}"))
        stage.head.register_forward_hook(lambda *_, k=k: ran.append(f"head {k}"))
    model.forward_exit(torch.rand(1, 1, 8, 8), 2)
    assert ran == ["trunk 1", "trunk 2", "head 2"]


@pytest.mark.parametrize("name", ["digits-cnn", "msdnet-cifar10", "resnet38", "mobilenetv2"])
def test_the_static_network_is_the_backbone_with_the_last_head(name) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = build_model(name, 10).eval()
    static = single_exit(network)
    images = torch.rand(2, *network.input_shape)
    with torch.no_grad():
        torch.testing.assert_close(static(images)[0], network(images)[-1])
    full, alone = exit_costs(network)[-1], exit_costs(static)[0]
    heads = [value for stage in network.stages[:-1] for value in stage.head.parameters()]
    assert alone.parameters == full.parameters - sum(value.numel() for value in heads)
    assert alone.macs < full.macs
    side_heads = {id(value) for value in heads}
    kept = {id(value) for value in static.parameters()}
    assert kept == {id(value) for value in network.parameters()} - side_heads
    assert MODELS[f"{name}-single"].exits == 1
    assert [tuple(value.shape) for value in build_model(f"{name}-single", 10).parameters()] == [
        tuple(value.shape) for value in static.parameters()
    ]


def test_a_network_with_some_of_its_exits_has_their_logits_numbers_and_costs() -> None:
    torch.manual_seed(0)
    network = build_model("digits-cnn", 10).eval()
    kept = keep_exits(network, (2, 3))
    images = torch.rand(2, *network.input_shape)
    with torch.no_grad():
        torch.testing.assert_close(kept(images), network(images)[1:])
        torch.testing.assert_close(kept.forward_exit(images, 1), network.forward_exit(images, 2))
    assert network.numbers == (1, 2, 3)
    assert kept.numbers == (2, 3)
    head = exit_costs(network)[0].head_macs
    assert [one.macs for one in exit_costs(kept)] == [one.macs - head for one in exit_costs(network)[1:]]
