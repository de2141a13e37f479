"""Exits on networks of timm of ten families: the last exit equals the network, and every head gets a gradient."""

from __future__ import annotations

import pytest
import torch

from mexit import attach_exits

timm = pytest.importorskip("timm", exc_type=ImportError, reason="needs the extra timm")

pytestmark = pytest.mark.long

SIDE = 64
NETWORKS: dict[str, dict[str, int]] = {
    "resnet18": {}, "regnety_002": {}, "mobilenetv3_small_050": {}, "efficientnet_b0": {}, "convnext_atto": {},
    "repvgg_a0": {}, "vit_tiny_patch16_224": {"img_size": SIDE}, "deit_tiny_patch16_224": {"img_size": SIDE},
    "fastvit_t8": {}, "mobilevit_xxs": {},
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_the_last_exit_equals_the_network_and_all_heads_train(name: str) -> None:
    torch.manual_seed(0)
    module = timm.create_model(name, **NETWORKS[name])
    network = attach_exits(
        module, classes=module.num_classes, input_shape=(3, SIDE, SIDE), mean=(0.5,) * 3, std=(0.25,) * 3
    ).eval()
    images = torch.rand(4, 3, SIDE, SIDE)
    with torch.no_grad():
        assert torch.allclose(network(images)[-1], module((images - 0.5) / 0.25), atol=1e-5)
    assert network.exits > 2
    network.train()(images).logsumexp(dim=-1).mean().backward()
    assert all(parameter.grad is not None for stage in network.stages for parameter in stage.head.parameters())
