"""The network of the demo: three exits on 8x8 grey images, without BatchNorm or dropout, trained in seconds."""

from __future__ import annotations

from torch import nn

from mexit.models.multi_exit import MultiExit, Stage

INPUT_SHAPE = (1, 8, 8)


def build(classes: int) -> MultiExit:
    """A freshly initialised network with exits after 2, 4 and 6 convolutions."""
    network = MultiExit(
        [
            Stage(_block(1, 16, 24), _head(24, 4, classes)),
            Stage(_block(24, 40, 40, first_stride=2), _head(40, 2, classes)),
            Stage(_block(40, 64, 64), _head(64, 2, classes)),
        ],
        INPUT_SHAPE,
        classes,
    )
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return network


def _block(width_in: int, width: int, width_out: int, first_stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width, 3, stride=first_stride, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width_out, 3, padding=1),
        nn.ReLU(),
    )


def _head(width: int, side: int, classes: int) -> nn.Sequential:
    """Pooling to `side` x `side`, then two linear layers."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(side),
        nn.Flatten(),
        nn.Linear(width * side * side, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )
