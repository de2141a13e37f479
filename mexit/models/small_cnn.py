"""SmallCNN with three exits, the network of RDI-Nets for MNIST.

T.-K. Hu, T. Chen, H. Wang, Z. Wang: Triple Wins, ICLR 2020, and its public code, which this follows layer by layer.
Convolutions are 3x3 without padding, with bias, without BatchNorm. The side branches have no activation between their
linear layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import nn

from mexit.models.multi_exit import MultiExit, Normalise, Stage, check_sides

INPUT_SHAPE = (1, 28, 28)


SMALLEST = 14  # pixels of a side that leave one pixel to the last classifier


def build(
    classes: int,
    input_shape: tuple[int, int, int] = INPUT_SHAPE,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> MultiExit:
    """A freshly initialised network with exits after the first and third convolution and at the end.

    Args:
        classes: C.
        input_shape: (channels, H, W).
        mean, std: normalisation of the pixels, one number per channel, for pixels in [0, 1]; () = none.

    Raises:
        UsageError: a side has fewer than 14 pixels.
    """
    check_sides(input_shape, SMALLEST)
    channels, *sides = input_shape
    # Receptive field of each classifier: convolutions take two rows and columns, pooling halves and rounds down.
    areas = [prod(count(side) for side in sides) for count in (_first_side, _second_side, _third_side)]
    first = Stage(
        nn.Sequential(nn.Conv2d(channels, 32, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(32, 16, 3, stride=2), nn.MaxPool2d(2), nn.Flatten(), *_linears(16 * areas[0], classes)),
    )
    second = Stage(
        nn.Sequential(nn.Conv2d(32, 32, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), *_linears(64 * areas[1], classes)),
    )
    classifier = nn.Linear(200, classes)
    third = Stage(
        nn.Sequential(nn.Conv2d(64, 64, 3), nn.MaxPool2d(2), nn.ReLU()),
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * areas[2], 200),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(200, 200),
            nn.ReLU(),
            classifier,
        ),
    )
    network = MultiExit([first, second, third], input_shape, classes, Normalise(mean, std) if mean else None)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    return network


def _first_side(side: int) -> int:
    return ((side - 5) // 2 + 1) // 2


def _second_side(side: int) -> int:
    return ((side - 4) // 2 - 2) // 2


def _third_side(side: int) -> int:
    return ((side - 4) // 2 - 4) // 2


def _linears(width: int, classes: int) -> list[nn.Module]:
    return [nn.Linear(width, 200), nn.Dropout(0.5), nn.Linear(200, 200), nn.Linear(200, classes)]
