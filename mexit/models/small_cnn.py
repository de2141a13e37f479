"""SmallCNN with three exits, the network of RDI-Nets for MNIST.

T.-K. Hu, T. Chen, H. Wang, Z. Wang: Triple Wins, ICLR 2020, and its public code, which this follows layer by layer.
Convolutions are 3x3 without padding, with bias, without BatchNorm. The side branches have no activation between their
linear layers.
"""

from __future__ import annotations

from torch import nn

from mexit.models.multi_exit import MultiExit, Stage

INPUT_SHAPE = (1, 28, 28)


def build(classes: int) -> MultiExit:
    """A freshly initialised network with exits after the first and third convolution and at the end."""
    first = Stage(
        nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(32, 16, 3, stride=2), nn.MaxPool2d(2), nn.Flatten(), *_linears(576, classes)),
    )
    second = Stage(
        nn.Sequential(nn.Conv2d(32, 32, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), *_linears(1600, classes)),
    )
    classifier = nn.Linear(200, classes)
    third = Stage(
        nn.Sequential(nn.Conv2d(64, 64, 3), nn.MaxPool2d(2), nn.ReLU()),
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(1024, 200),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(200, 200),
            nn.ReLU(),
            classifier,
        ),
    )
    network = MultiExit([first, second, third], INPUT_SHAPE, classes)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    return network


def _linears(width: int, classes: int) -> list[nn.Module]:
    return [nn.Linear(width, 200), nn.Dropout(0.5), nn.Linear(200, 200), nn.Linear(200, classes)]
