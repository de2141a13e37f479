"""RDI-ResNet: the residual network of 6n + 2 layers for CIFAR with six side branches.

K. He et al.: Deep Residual Learning, CVPR 2016; T.-K. Hu, T. Chen, H. Wang, Z. Wang: Triple Wins (RDI-Nets), ICLR 2020,
and its public code, which this follows layer by layer. n = 6 is ResNet-38; n = 12, 18 and 25 are ResNet-74, -110 and
-152. Pixels are not normalised.
"""

from __future__ import annotations

from torch import Tensor, nn

from mexit.errors import UsageError
from mexit.models.multi_exit import MultiExit, Stage

INPUT_SHAPE = (3, 32, 32)
WIDTHS = (16, 32, 64)
EXITS = 7


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the size changes the shortcut is a 1x1 convolution."""

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        """(B, width_in, H, W) to (B, width, H / stride, W / stride)."""
        activated: Tensor = self.relu(self.body(features) + self.shortcut(features))
        return activated


def build(classes: int, n: int = 6) -> MultiExit:
    """A freshly initialised network.

    Args:
        classes: C.
        n: blocks per group, at least 2. Side branches follow blocks n // 4 and 3n // 4 (from 0) of each group.

    Raises:
        UsageError: n is below 2.
    """
    if n < 2:
        raise UsageError(f"ResNet: each group has two exits and needs at least 2 blocks, found {n}")
    layers: list[nn.Module] = [
        nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False),
        nn.BatchNorm2d(WIDTHS[0]),
        nn.ReLU(inplace=True),
    ]
    stages = []
    width = WIDTHS[0]
    for group, group_width in enumerate(WIDTHS):
        for block in range(n):
            layers.append(BasicBlock(width, group_width, stride=2 if group and not block else 1))
            width = group_width
            if block in (n // 4, 3 * n // 4):
                stages.append(Stage(nn.Sequential(*layers), _branch(group, classes)))
                layers = []
    stages.append(Stage(nn.Sequential(*layers), _classifier(width, classes)))
    network = MultiExit(stages, INPUT_SHAPE, classes)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return network


def _branch(group: int, classes: int) -> nn.Sequential:
    """The side branch of a group, from 0."""
    width = WIDTHS[group]
    if group == 0:
        return nn.Sequential(
            nn.MaxPool2d(2),
            nn.Conv2d(width, 64, 5, padding=2, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            *_classifier(32, classes),
        )
    if group == 1:
        return nn.Sequential(nn.MaxPool2d(2), BasicBlock(width, width), *_classifier(width, classes))
    return _classifier(width, classes)


def _classifier(width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(width, classes))
