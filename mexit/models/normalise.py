"""Normalisation inside the network, so that pixels, attacks and eps stay in [0, 1] outside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """(pixels - mean) / std, channel by channel.

    Args:
        mean, std: of each channel, for pixels in [0, 1]; stored with the weights, but not trained.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) in [0, 1] to about zero mean and unit variance."""
        return (images - self.mean) / self.std
