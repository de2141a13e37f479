"""Random augmentation of training images, with counter-based random numbers.

shift               move by up to 2 pixels in each direction; for digits and signs, which have no mirror images
crop-flip           pad by 4 black pixels on each side, crop the original size, mirror half of the images: the
                    augmentation of MSDNet and RDI-Nets on CIFAR
reflect-crop-flip   the same crop with reflected borders; each image is mirrored in every second epoch, half of them in
                    the even ones (K. Jordan, arXiv 2404.00498)
resized-crop-flip   crop 8 to 100 % of the area at an aspect ratio of 3/4 to 4/3, resize to the original size, mirror
                    half of the images: the augmentation of MSDNet on ImageNet (C. Szegedy et al., CVPR 2015)
photo               turn by up to 15 degrees, scale each side by 0.8 to 1.25, move by up to 12 % of each side, with
                    reflected borders; multiply brightness and contrast by 0.5 to 2; for photographs of objects whose
                    mirror image may mean something else

`flip` adds mirror images to any of them, or removes them.

The papers crop the original photograph and resize once. Here the crop is taken from the prepared image, because
training shares its image preparation with every later stage. This is our choice; small crops are softer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mexit.attacks.rng import CounterRNG

AUGMENTS = ("none", "shift", "crop-flip", "reflect-crop-flip", "resized-crop-flip", "photo")
PAD, SHIFT = 4, 2
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
# Of "photo": degrees, largest factor of a side's length, share of a side, largest factor of brightness and contrast.
TURN, SCALE, MOVE, LIGHT = 15.0, 1.25, 0.12, 2.0
_CROP_ATTEMPTS = 10


def augment(images: Tensor, kind: str, rng: CounterRNG, index: Tensor, flip: bool | None = None) -> Tensor:
    """Augment a batch.

    Args:
        images: (B, C, H, W) of any dtype; float32 in [0, 1] for "resized-crop-flip" and "photo".
        kind: one of `AUGMENTS`.
        rng: random numbers of the epoch.
        index: positions of the images in the data set, (B,) int64; each image's random numbers depend on its own.
        flip: whether half of the images are mirrored; None = if `kind` ends in "flip".

    Returns:
        (B, C, H, W) of the same dtype.
    """
    mirrored = _mirrored(kind, rng, index, flip)
    if kind == "none":
        return images if flip is None else torch.where(mirrored[:, None, None, None], images.flip(3), images)
    if kind == "resized-crop-flip":
        return _resized_crop(images, rng, index, mirrored)
    if kind == "photo":
        return _change_light(_turn_and_scale(images, rng, index, mirrored), rng, index)
    corners = rng.uniform("augment", index, (3,))[:, :2]
    if kind == "shift":
        return _crop(F.pad(images, (SHIFT,) * 4), SHIFT, corners, mirrored)
    padded = F.pad(images, (PAD,) * 4) if kind == "crop-flip" else _reflected(images)
    return _crop(padded, PAD, corners, mirrored)


def mirrors(kind: str, flip: bool | None) -> bool:
    """Whether an augmentation mirrors half of the images: `flip`; if it is None, whether `kind` ends in "flip"."""
    return kind.endswith("flip") if flip is None else flip


def _mirrored(kind: str, rng: CounterRNG, index: Tensor, flip: bool | None) -> Tensor:
    """Which images are mirrored, (B,) bool."""
    if not mirrors(kind, flip):
        return torch.zeros_like(index, dtype=torch.bool)
    if kind == "crop-flip":
        return rng.uniform("augment", index, (3,))[:, 2] < 0.5
    if kind == "reflect-crop-flip":
        first = CounterRNG(rng.seed, 0).uniform("mirror", index, ()) < 0.5
        return first ^ bool(rng.epoch % 2)
    return rng.uniform("mirror", index, ()) < 0.5


def _reflected(images: Tensor) -> Tensor:
    """Images with reflected borders of `PAD` pixels, of any dtype."""
    for axis in (2, 3):
        size = images.shape[axis]
        positions = torch.arange(-PAD, size + PAD, device=images.device).abs()
        images = images.index_select(axis, torch.where(positions < size, positions, 2 * (size - 1) - positions))
    return images


def _crop(padded: Tensor, pad: int, numbers: Tensor, mirrored: Tensor) -> Tensor:
    """Crop padded images at random corners, and mirror some.

    Args:
        padded: (B, C, H + 2 pad, W + 2 pad).
        pad: pixels on each side.
        numbers: uniform numbers in [0, 1), (B, 2).
        mirrored: (B,) bool.

    Returns:
        (B, C, H, W).
    """
    height, width = padded.shape[2] - 2 * pad, padded.shape[3] - 2 * pad
    corner = (numbers * (2 * pad + 1)).long().clamp_(max=2 * pad)
    rows = corner[:, :1] + torch.arange(height, device=padded.device)
    columns = corner[:, 1:] + torch.arange(width, device=padded.device)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    batch, channels = (torch.arange(size, device=padded.device) for size in padded.shape[:2])
    return padded[batch[:, None, None, None], channels[None, :, None, None], rows[:, None, :, None],
                  columns[:, None, None, :]]  # fmt: skip


def _resized_crop(images: Tensor, rng: CounterRNG, index: Tensor, mirrored: Tensor) -> Tensor:
    height, width = images.shape[2:]
    top, left, rows, columns = crop_boxes(rng, index, height, width).to(images.dtype).unbind(1)
    x = _grid_coordinates(left, columns, width)
    x = torch.where(mirrored[:, None], x.flip(1), x)
    y = _grid_coordinates(top, rows, height)
    grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=3)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False).clamp_(0, 1)


def _turn_and_scale(images: Tensor, rng: CounterRNG, index: Tensor, mirrored: Tensor) -> Tensor:
    """Turn, scale, move and mirror about the centre, with reflected borders: one linear map for each image."""
    height, width = images.shape[2:]
    numbers = 2 * rng.uniform("augment", index, (5,)) - 1  # in [-1, 1)
    angle = numbers[:, 0] * math.radians(TURN)
    scale_x, scale_y = (SCALE ** numbers[:, 1:3]).unbind(1)
    scale_x = torch.where(mirrored, -scale_x, scale_x)
    cos, sin = angle.cos(), angle.sin()
    # `affine_grid` maps coordinates of the result to those of the source, where each side is 2 long.
    aspect = height / width
    rows = [
        torch.stack([scale_x * cos, -scale_y * sin * aspect, 2 * MOVE * numbers[:, 3]], dim=1),
        torch.stack([scale_x * sin / aspect, scale_y * cos, 2 * MOVE * numbers[:, 4]], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _change_light(images: Tensor, rng: CounterRNG, index: Tensor) -> Tensor:
    """Multiply each image by a brightness, and its differences from its own mean by a contrast."""
    brightness, contrast = (LIGHT ** (2 * rng.uniform("light", index, (2, 1, 1, 1)) - 1)).unbind(1)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return ((images - mean) * (brightness * contrast) + mean * brightness).clamp_(0, 1)


def crop_boxes(rng: CounterRNG, index: Tensor, height: int, width: int) -> Tensor:
    """Draw the crop of each image: the first of ten random boxes that fits, else the whole image.

    Returns:
        Top, left, rows and columns in pixels, (B, 4) int64.
    """
    numbers = rng.uniform("augment", index, (_CROP_ATTEMPTS, 4)).double()
    area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * numbers[..., 0])
    low, high = (math.log(ratio) for ratio in RATIO)
    ratio = torch.exp(low + (high - low) * numbers[..., 1])
    columns, rows = ((area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long())
    fits = (columns >= 1) & (columns <= width) & (rows >= 1) & (rows <= height)
    top = (numbers[..., 2] * (height - rows + 1)).long()
    left = (numbers[..., 3] * (width - columns + 1)).long()
    boxes = torch.stack([top, left, rows, columns], dim=2)
    first = boxes[torch.arange(len(index), device=index.device), fits.int().argmax(dim=1)]
    whole = torch.tensor([0, 0, height, width], device=index.device)
    return torch.where(fits.any(dim=1, keepdim=True), first, whole)


def _grid_coordinates(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Source coordinates of `size` output pixels, in `grid_sample`'s range of [-1, 1], clamped to the crop."""
    step = (torch.arange(size, device=start.device) + 0.5) / size
    position = start[:, None] + (step * length[:, None] - 0.5).clamp(min=0)
    last = start + length - 1
    return (2 * torch.minimum(position, last[:, None]) + 1) / size - 1
