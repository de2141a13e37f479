"""MnistCNN: three exits for 28x28 pixels at the cost of SmallCNN, with nonlinear heads and a small first stage.

SmallCNN's first branch has no activation of its own, so exit 1 is nearly linear. Here the first stage is cheap (16
channels, pooled at once), which leaves exit 1 a head of two convolutions and two linear layers with ReLU. Every exit
costs at most what the same exit of SmallCNN costs. Convolutions are 3x3 with padding and bias, without BatchNorm.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mexit.models.multi_exit import MultiExit, Normalise, Stage, check_sides

INPUT_SHAPE = (1, 28, 28)


def build(
    classes: int,
    input_shape: tuple[int, int, int] = INPUT_SHAPE,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> MultiExit:
    """A freshly initialised network; stages 1 to 3 carry 16x14x14, 64x7x7 and 96x7x7 features of 28x28 pixels.

    Args:
        classes: C.
        input_shape: (channels, H, W).
        mean, std: normalisation of the pixels, one number per channel, for pixels in [0, 1]; () = none.

    Raises:
        UsageError: a side has fewer than 4 pixels.
    """
    check_sides(input_shape, 4)
    channels, height, width = input_shape
    # The first head halves by a convolution, which rounds up, and the second stage by pooling, which rounds down.
    first_area, area = -(-(height // 2) // 2) * -(-(width // 2) // 2), (height // 4) * (width // 4)
    first = Stage(
        nn.Sequential(_conv(channels, 16), nn.MaxPool2d(2), nn.ReLU()),
        nn.Sequential(
            _conv(16, 32, stride=2), nn.ReLU(), _conv(32, 32), nn.ReLU(), *_classifier(32 * first_area, 128, classes)
        ),
    )
    second = Stage(
        nn.Sequential(_conv(16, 64), nn.MaxPool2d(2), nn.ReLU(), _conv(64, 64), nn.ReLU(), _conv(64, 64), nn.ReLU()),
        nn.Sequential(*_classifier(64 * area, 128, classes)),
    )
    third = Stage(nn.Sequential(_conv(64, 96), nn.ReLU()), nn.Sequential(*_classifier(96 * area, 200, classes)))
    return MultiExit([first, second, third], input_shape, classes, Normalise(mean, std) if mean else None)


def _conv(width_in: int, width: int, stride: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(width_in, width, 3, stride=stride, padding=1)
    _initialise(layer)
    return layer


def _classifier(width: int, hidden: int, classes: int) -> list[nn.Module]:
    first, last = nn.Linear(width, hidden), nn.Linear(hidden, classes)
    _initialise(first)
    _initialise(last)
    nn.init.zeros_(last.weight)  # equal probabilities at the start, as in SmallCNN
    return [nn.Flatten(), first, nn.ReLU(), last]


def _initialise(layer: nn.Conv2d | nn.Linear) -> None:
    assert layer.bias is not None
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
