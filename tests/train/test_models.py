"""The networks are what the papers say."""

from __future__ import annotations

import torch

from mexit.train.models import PRESETS, build


def test_small_cnn_convolutions_cost_what_rdi_nets_publishes() -> None:
    """RDI-Nets' table: 0.818, 7.00, 9.25 "MFlops" = convolution MACs / 2**20, own branch only."""
    model = build("small-cnn", 10).eval()
    macs: dict[torch.nn.Module, int] = {}

    def count(layer: torch.nn.Module, _: object, out: torch.Tensor) -> None:
        assert isinstance(layer, torch.nn.Conv2d)
        macs[layer] = out[0].numel() * layer.weight[0].numel()

    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(count)
    model(torch.rand(1, 1, 28, 28))
    trunk, per_exit = 0, []
    for stage in model.stages:
        trunk += sum(macs.get(layer, 0) for layer in stage.trunk.modules())
        per_exit.append(trunk + sum(macs.get(layer, 0) for layer in stage.head.modules()))
    assert [round(cost / 2**20, 3) for cost in per_exit] == [0.818, 7.006, 9.256]


def test_small_cnn_is_initialised_as_rdi_nets_does() -> None:
    *_, answer = build("small-cnn", 10).stages[-1].head
    assert not answer.weight.any()
    assert not answer.bias.any()


def test_forward_gives_every_exit_and_upto_stops_early() -> None:
    torch.set_num_threads(1)
    for name, preset in PRESETS.items():
        model = build(name, 7).eval()
        images = torch.rand(2, *preset.input_shape)
        with torch.no_grad():
            logits = model(images)
            assert logits.shape == (preset.exits, 2, 7)
            torch.testing.assert_close(model(images, upto=1)[0], logits[0])


def test_upto_does_not_run_later_stages() -> None:
    model = build("digits-cnn", 10)
    ran = []
    for k, stage in enumerate(model.stages, start=1):
        stage.register_forward_hook(lambda *_, k=k: ran.append(k))
    model(torch.rand(1, 1, 8, 8), upto=2)
    assert ran == [1, 2]
