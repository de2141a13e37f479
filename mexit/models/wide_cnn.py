"""WideCNN: a shallow residual network for small images, with exits at about a third, two thirds and all of its cost.

Few wide layers use a GPU better than the many narrow ones of MSDNet and ResNet-38. One tensor is carried from stage to
stage. The layers of a stage are those of K. He et al. (CVPR 2016): a strided 3x3 convolution, then one basic block.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mexit.models.multi_exit import MultiExit, Normalise, Stage, check_sides
from mexit.models.resnet import BasicBlock

INPUT_SHAPE = (3, 32, 32)
STEM = 32


LARGE = 64  # pixels of the shorter side from which on the stem halves the image, once more at each doubling


def build(
    classes: int,
    widths: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    stem: int = STEM,
    input_shape: tuple[int, int, int] = INPUT_SHAPE,
) -> MultiExit:
    """A freshly initialised network.

    Args:
        classes: C.
        widths: channels of each stage, one exit each; stage k has 1 / 2^k of the pixels a side that the stem has.
        mean, std: normalisation of the pixels, one number per channel, for pixels in [0, 1].
        stem: channels of the first convolution.
        input_shape: (channels, H, W). A shorter side of 64 pixels or more is halved by the stem until it is below 64.

    Raises:
        UsageError: a side has fewer pixels than the stages can halve.
    """
    check_sides(input_shape, 2 ** len(widths))
    channels, *sides = input_shape
    halvings = (min(sides) // LARGE).bit_length()
    layers = _unit(channels, stem, stride=2 if halvings else 1)
    for _ in range(halvings - 1):
        layers += _unit(stem, stem, stride=2)
    stages, width_in = [], stem
    for width in widths:
        layers += [*_unit(width_in, width, stride=2), BasicBlock(width, width)]
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
        stages.append(Stage(nn.Sequential(*layers), head))
        layers, width_in = [], width
    network = MultiExit(stages, input_shape, classes, Normalise(mean, std))
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return network


def _unit(width_in: int, width: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
