"""Random views of training images: what MSDNet and RDI-Nets do on CIFAR, with randomness by counter.

crop-flip   pad with 4 black pixels on each side, cut the old size out anywhere, mirror every second image
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mexit.train.randomness import Draw

AUGMENTS = ("none", "crop-flip")
PAD = 4


def augment(images: Tensor, how: str, draw: Draw, index: Tensor) -> Tensor:
    """This epoch's view of a batch.

    Args:
        images: (B, C, H, W), of any type.
        how: one of `AUGMENTS`.
        draw, index: randomness by the samples' places in the data set, (B,).

    Returns:
        (B, C, H, W) of the same type.
    """
    if how == "none":
        return images
    numbers = draw.uniform("augment", index, (3,))
    corner = (numbers[:, :2] * (2 * PAD + 1)).long().clamp_(max=2 * PAD)
    mirrored = numbers[:, 2] < 0.5
    rows = corner[:, :1] + torch.arange(images.shape[2], device=images.device)
    columns = corner[:, 1:] + torch.arange(images.shape[3], device=images.device)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    batch, channels = (torch.arange(size, device=images.device) for size in images.shape[:2])
    padded = F.pad(images, (PAD, PAD, PAD, PAD))
    return padded[batch[:, None, None, None], channels[None, :, None, None], rows[:, None, :, None],
                  columns[:, None, None, :]]  # fmt: skip
