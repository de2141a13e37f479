"""ResNet-18 has the cost and the parameters that are published for CIFAR, and one exit after each group."""

from __future__ import annotations

import torch

from mexit.models import build_model
from mexit.models.exit_costs import exit_costs


def test_the_single_exit_network_is_the_usual_one() -> None:
    with torch.device("meta"):
        (alone,) = exit_costs(build_model("resnet18-single", 10))
    # By hand: the stem, four groups of four 3x3 convolutions (the first of each later group with half the inputs),
    # three 1x1 shortcuts, the classifier.
    groups = [
        9 * 4 * 64 * 64 * 1024,
        *(
            (9 * (width // 2 * width + 3 * width * width) + width // 2 * width) * side**2
            for width, side in ((128, 16), (256, 8), (512, 4))
        ),
    ]
    assert alone.macs == 9 * 3 * 64 * 1024 + sum(groups) + 5120
    assert round(alone.macs / 1e6) == 555
    assert alone.parameters == 11_173_962


def test_every_group_ends_with_an_exit() -> None:
    torch.set_num_threads(1)
    network = build_model("resnet18", 10).eval()
    with torch.no_grad():
        logits = network(torch.rand(2, 3, 32, 32))
    assert logits.shape == (4, 2, 10)
    assert [stage.head[-1].in_features for stage in network.stages] == [64, 128, 256, 512]
