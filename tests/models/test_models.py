"""SmallCNN is the published network, and one exit alone equals the whole forward pass."""

from __future__ import annotations

import torch

from mexit.models import MODELS, build_model


def test_small_cnn_convolutions_cost_what_rdi_nets_publishes() -> None:
    """RDI-Nets' table: 0.818, 7.00, 9.25 "MFlops" = convolution MACs / 2**20, own branch only."""
    model = build_model("small-cnn", 10).eval()
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
    *_, classifier = build_model("small-cnn", 10).stages[-1].head
    assert not classifier.weight.any()
    assert not classifier.bias.any()


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
