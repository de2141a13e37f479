"""RDI-MobileNetV2: MobileNetV2 for CIFAR with six side branches.

M. Sandler et al.: MobileNetV2, CVPR 2018; T.-K. Hu, T. Chen, H. Wang, Z. Wang: Triple Wins (RDI-Nets), ICLR 2020, and
its public code, which this follows layer by layer: strides for 32x32 pixels, ReLU instead of ReLU6, a shortcut in every
block of stride 1. A convolution that the code creates and never uses is left out. Pixels are not normalised.
"""

from __future__ import annotations

from torch import Tensor, nn

from mexit.models.multi_exit import MultiExit, Stage

INPUT_SHAPE = (3, 32, 32)
# (expansion, width, blocks, stride of the first block)
GROUPS = (
    (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip
STEM, LAST = 32, 1280
EXPANSION = 6
EXITS = 7


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, 1x1 projection, and a shortcut if the stride is 1."""

    def __init__(self, width_in: int, width: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = expansion * width_in
        self.body = nn.Sequential(
            *_unit(width_in, inner, 1),
            *_unit(inner, inner, 3, stride=stride, groups=inner),
            nn.Conv2d(inner, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut: nn.Module | None = None
        if stride == 1:
            if width_in == width:
                self.shortcut = nn.Identity()
            else:
                self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, features: Tensor) -> Tensor:
        """(B, width_in, H, W) to (B, width, H / stride, W / stride)."""
        projected: Tensor = self.body(features)
        return projected if self.shortcut is None else projected + self.shortcut(features)


def build(classes: int, width: float = 1.0) -> MultiExit:
    """A freshly initialised network.

    Args:
        classes: C.
        width: multiplier of all widths but the stem's; RDI-Nets' code also has 0.75.
    """
    layers = _layers(width)
    cuts = [len(layers) * k // EXITS for k in range(1, EXITS)]  # after layers 2, 5, 8, 10, 13 and 16 of 19
    stages = [
        Stage(nn.Sequential(*layers[start:stop]), branch)
        for start, stop, branch in zip([0, *cuts], cuts, _branches(width, classes), strict=False)
    ]
    last = Stage(nn.Sequential(*layers[cuts[-1] :]), _classifier(4, int(LAST * width), classes))
    return MultiExit([*stages, last], INPUT_SHAPE, classes)


def _layers(width: float) -> list[nn.Module]:
    """The layers of the trunk: stem, 17 blocks, last convolution."""
    layers: list[nn.Module] = [nn.Sequential(*_unit(3, STEM, 3))]
    before = STEM
    for expansion, full, blocks, first_stride in GROUPS:
        after = int(full * width)
        for block in range(blocks):
            layers.append(InvertedResidual(before, after, expansion, 1 if block else first_stride))
            before = after
    return [*layers, nn.Sequential(*_unit(before, int(LAST * width), 1))]


def _branches(width: float, classes: int) -> list[nn.Sequential]:
    """The side branches of exits 1 to 6."""
    w16, w32, w64, w96, w160 = (int(full * width) for full in (16, 32, 64, 96, 160))
    return [
        nn.Sequential(
            InvertedResidual(w16, w32, EXPANSION, 2),
            nn.BatchNorm2d(w32),
            nn.ReLU(inplace=True),
            InvertedResidual(w32, w64, EXPANSION, 2),
            nn.BatchNorm2d(w64),
            *_classifier(8, w64, classes),
        ),
        nn.Sequential(InvertedResidual(w32, w32, EXPANSION, 2), *_classifier(8, w32, classes)),
        _classifier(8, w64, classes),
        _classifier(8, w64, classes),
        _classifier(8, w96, classes),
        _classifier(4, w160, classes),
    ]


def _unit(width_in: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(width_in, width, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]


def _classifier(side: int, width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(side), nn.Flatten(), nn.Linear(width, classes))
