"""The layers of MSDNet. Each takes one tensor per remaining scale, finest first, and returns as many or fewer.

G. Huang et al.: Multi-Scale Dense Networks for Resource Efficient Image Classification, ICLR 2018. Widths are those of
the public PyTorch port (kalviny/MSDNet-PyTorch).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Stem(nn.Module):
    """The first layer: computes the finest scale from the image, and every coarser scale from the next finer one.

    Args:
        widths: channels of each scale, finest first.
        stride: of the finest scale: 1 (CIFAR), 2, or 4 (ImageNet: 7x7 and max pooling).
        channels: of the image.
    """

    def __init__(self, widths: Sequence[int], stride: int, channels: int) -> None:
        super().__init__()
        coarser = [unit(before, after, stride=2) for before, after in pairwise(widths)]
        self.scales = nn.ModuleList([_finest_scale(channels, widths[0], stride), *coarser])

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Images (B, channels, H, W) to one tensor per scale."""
        features = [image]
        for scale in self.scales:
            features.append(scale(features[-1]))
        return tuple(features[1:])


class Growth(nn.Module):
    """One layer at one scale: concatenates [x, normal(x)], or [x, down(finer), normal(x)] if there is a finer scale.

    Args:
        normal: path within the scale.
        down: path of stride 2 from the next finer scale; None = there is none.
    """

    def __init__(self, normal: nn.Module, down: nn.Module | None) -> None:
        super().__init__()
        self.normal = normal
        self.down = down

    def forward(self, features: Tensor, finer: Tensor | None) -> Tensor:
        """This scale (B, width, H, W) and the finer one (B, width', 2H, 2W) to (B, wider, H, W)."""
        if self.down is None:
            return torch.cat([features, self.normal(features)], dim=1)
        return torch.cat([features, self.down(finer), self.normal(features)], dim=1)


class Layer(nn.Module):
    """One layer at all scales.

    Args:
        growths: one per output scale, finest first. If the first has a path from a finer scale, this scale ends here.
    """

    def __init__(self, growths: Sequence[Growth]) -> None:
        super().__init__()
        self.growths = nn.ModuleList(growths)

    def forward(self, *scales: Tensor) -> tuple[Tensor, ...]:
        """One tensor per input scale to one per output scale."""
        dropped = len(scales) - len(self.growths)
        return tuple(
            growth(scales[scale], scales[scale - 1] if scale else None)
            for scale, growth in enumerate(self.growths, start=dropped)
        )


class Transition(nn.Module):
    """1x1 units that reduce the channels of every scale.

    Args:
        widths: input and output channels of each scale, finest first.
    """

    def __init__(self, widths: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(unit(before, after, kernel=1) for before, after in widths)

    def forward(self, *scales: Tensor) -> tuple[Tensor, ...]:
        """One tensor per input scale to one per output scale."""
        return tuple(narrow(features) for narrow, features in zip(self.scales, scales, strict=True))


class Head(nn.Module):
    """The classifier of an exit, on the coarsest scale.

    Args:
        width_in: channels of the coarsest scale.
        width: channels inside the classifier.
        classes: C.
    """

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
        """One tensor per scale to logits (B, C)."""
        logits: Tensor = self.layers(scales[-1])
        return logits


def unit(width_in: int, width_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(width_out),
        nn.ReLU(inplace=True),
    )


def bottleneck_unit(width_in: int, width_out: int, factor: int | None, stride: int = 1) -> nn.Sequential:
    """A 3x3 unit after a 1x1 unit with at most `factor` times the output channels; None = the 3x3 unit alone."""
    if factor is None:
        return unit(width_in, width_out, stride=stride)
    inner = min(width_in, factor * width_out)
    return nn.Sequential(unit(width_in, inner, kernel=1), unit(inner, width_out, stride=stride))


def _finest_scale(channels: int, width: int, stride: int) -> nn.Sequential:
    if stride != 4:
        return unit(channels, width, stride=stride)
    return nn.Sequential(
        nn.Conv2d(channels, width, 7, stride=2, padding=3),  # with a bias, as in the port
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
