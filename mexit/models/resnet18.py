"""ResNet-18 for CIFAR: four groups of two basic blocks with an exit after each; `resnet18-single` is the usual network.

K. He et al.: Deep Residual Learning, CVPR 2016, in the form that is usual on 32 x 32 pixels: a 3x3 stem without
pooling. It is a teacher for the smaller networks; the place of the side heads is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mexit.models.multi_exit import MultiExit, Normalise, Stage
from mexit.models.resnet import BasicBlock

INPUT_SHAPE = (3, 32, 32)
WIDTHS = (64, 128, 256, 512)


def build(
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    input_shape: tuple[int, int, int] = INPUT_SHAPE,
) -> MultiExit:
    """A freshly initialised network.

    Args:
        classes: C.
        mean, std: normalisation of the pixels, one number per channel, for pixels in [0, 1].
        input_shape: (channels, H, W).
    """
    width = WIDTHS[0]
    layers: list[nn.Module] = [
        nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    stages = []
    for group, group_width in enumerate(WIDTHS):
        stride = 2 if group else 1
        layers += [BasicBlock(width, group_width, stride), BasicBlock(group_width, group_width)]
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(group_width, classes))
        stages.append(Stage(nn.Sequential(*layers), head))
        layers, width = [], group_width
    network = MultiExit(stages, input_shape, classes, Normalise(mean, std))
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return network
