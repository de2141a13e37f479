"""Random views of training images, with randomness by counter.

crop-flip           pad with 4 black pixels on each side, cut the old size out anywhere, mirror every second image:
                    what MSDNet and RDI-Nets do on CIFAR
resized-crop-flip   cut out 8 to 100 % of the area at an aspect ratio of 3/4 to 4/3, scale that back to the old
                    size, mirror every second image: what MSDNet does on ImageNet (C. Szegedy et al., CVPR 2015)

The papers cut from the whole photograph and scale once. Here the cut is made from the prepared image, because
every stage shares one preparation: a reading, and on small cuts a softer picture.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mexit.attacks.rng import CounterRNG

AUGMENTS = ("none", "crop-flip", "resized-crop-flip")
PAD = 4
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_TRIES = 10


def augment(images: Tensor, how: str, draw: CounterRNG, index: Tensor) -> Tensor:
    """This epoch's view of a batch.

    Args:
        images: (B, C, H, W), of any type; float32 in [0, 1] for "resized-crop-flip".
        how: one of `AUGMENTS`.
        draw, index: randomness by the samples' places in the data set, (B,).

    Returns:
        (B, C, H, W) of the same type.
    """
    if how == "none":
        return images
    return _crop_flip(images, draw, index) if how == "crop-flip" else _resized_crop_flip(images, draw, index)


def _crop_flip(images: Tensor, draw: CounterRNG, index: Tensor) -> Tensor:
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


def _resized_crop_flip(images: Tensor, draw: CounterRNG, index: Tensor) -> Tensor:
    height, width = images.shape[2:]
    top, left, rows, columns = boxes(draw, index, height, width).to(images.dtype).unbind(1)
    x = _positions(left, columns, width)
    mirrored = draw.uniform("mirror", index, (1,)) < 0.5
    x = torch.where(mirrored, x.flip(1), x)
    y = _positions(top, rows, height)
    grid = torch.stack(
        [x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)],
        dim=3,
    )
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False).clamp_(0, 1)


def boxes(draw: CounterRNG, index: Tensor, height: int, width: int) -> Tensor:
    """What is cut out of each image: top, left, rows, columns, (B, 4) int64.

    The first of ten tries that fits, as in the field's code; the whole image if none does.
    """
    numbers = draw.uniform("augment", index, (_TRIES, 4)).double()
    area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * numbers[..., 0])
    low, high = (math.log(ratio) for ratio in RATIO)
    ratio = torch.exp(low + (high - low) * numbers[..., 1])
    columns, rows = ((area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long())
    fits = (columns >= 1) & (columns <= width) & (rows >= 1) & (rows <= height)
    top = (numbers[..., 2] * (height - rows + 1)).long()
    left = (numbers[..., 3] * (width - columns + 1)).long()
    tries = torch.stack([top, left, rows, columns], dim=2)
    first = tries[torch.arange(len(index), device=index.device), fits.int().argmax(dim=1)]
    whole = torch.tensor([0, 0, height, width], device=index.device)
    return torch.where(fits.any(dim=1, keepdim=True), first, whole)


def _positions(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Where each of `size` new pixels lies on an axis that `grid_sample` calls -1 to 1; never outside the cut."""
    step = (torch.arange(size, device=start.device) + 0.5) / size
    place = start[:, None] + (step * length[:, None] - 0.5).clamp(min=0)
    last = start + length - 1
    return (2 * torch.minimum(place, last[:, None]) + 1) / size - 1
