"""The modules of MSDNet. Each takes one tensor a surviving scale, finest first, and returns as many or fewer.

G. Huang et al.: Multi-Scale Dense Networks for Resource Efficient Image Classification, ICLR 2018. Widths are
those of the public PyTorch port that NEO-KD and HDKD build on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Stem(nn.Module):
    """Image to all scales: the finest from the image, every coarser one from the next finer.

    Args:
        widths: channels of each scale, finest first.
        shrink: of the finest scale against the image: 1 (CIFAR), 2, or 4 (ImageNet, 7x7 and max pooling).
        channels: of the image.
    """

    def __init__(self, widths: Sequence[int], shrink: int, channels: int) -> None:
        super().__init__()
        coarser = [unit(before, after, stride=2) for before, after in pairwise(widths)]
        self.scales = nn.ModuleList([_first(channels, widths[0], shrink), *coarser])

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(B, channels, H, W) to one tensor a scale."""
        features = [image]
        for scale in self.scales:
            features.append(scale(features[-1]))
        return tuple(features[1:])


class Growth(nn.Module):
    """One layer at one scale: [x, normal(x)], or [x, down(finer), normal(x)] where there is a finer one."""

    def __init__(self, normal: nn.Module, down: nn.Module | None) -> None:
        super().__init__()
        self.normal = normal
        self.down = down

    def forward(self, features: Tensor, finer: Tensor | None) -> Tensor:
        """(B, width, H, W), and the finer scale (B, width', 2H, 2W), to (B, wider, H, W)."""
        if self.down is None:
            return torch.cat([features, self.normal(features)], dim=1)
        return torch.cat([features, self.down(finer), self.normal(features)], dim=1)


class Layer(nn.Module):
    """One layer of the two-dimensional grid.

    Args:
        growths: one a scale that goes out, finest first. Where the first of them has a `down`, the finest scale
            that comes in ends here: it is read for the last time.
    """

    def __init__(self, growths: Sequence[Growth]) -> None:
        super().__init__()
        self.growths = nn.ModuleList(growths)

    def forward(self, *scales: Tensor) -> tuple[Tensor, ...]:
        """One tensor a scale in, one a scale out."""
        dropped = len(scales) - len(self.growths)
        return tuple(
            growth(scales[place], scales[place - 1] if place else None)
            for place, growth in enumerate(self.growths, start=dropped)
        )


class Transition(nn.Module):
    """1x1 units that narrow every scale, where a scale has just been dropped."""

    def __init__(self, widths: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(unit(before, after, kernel=1) for before, after in widths)

    def forward(self, *scales: Tensor) -> tuple[Tensor, ...]:
        """One tensor a scale in, one a scale out."""
        return tuple(narrow(features) for narrow, features in zip(self.scales, scales, strict=True))


class Head(nn.Module):
    """The classifier: it reads the coarsest scale, and never another."""

    def __init__(self, width_in: int, width: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            unit(width_in, width, stride=2),
            unit(width, width, stride=2),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(width, classes),
        )

    def forward(self, *scales: Tensor) -> Tensor:
        """One tensor a scale to logits (B, C)."""
        logits: Tensor = self.layers(scales[-1])
        return logits


def unit(width_in: int, width_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(width_out),
        nn.ReLU(inplace=True),
    )


def bottleneck_unit(width_in: int, width_out: int, factor: int | None, stride: int = 1) -> nn.Sequential:
    """A 3x3 unit, behind a 1x1 unit to at most `factor` times the output's width unless that is None."""
    if factor is None:
        return unit(width_in, width_out, stride=stride)
    inner = min(width_in, factor * width_out)
    return nn.Sequential(unit(width_in, inner, kernel=1), unit(inner, width_out, stride=stride))


def _first(channels: int, width: int, shrink: int) -> nn.Sequential:
    if shrink != 4:
        return unit(channels, width, stride=shrink)
    return nn.Sequential(
        nn.Conv2d(channels, width, 7, stride=2, padding=3),  # with a bias, as in the port
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
