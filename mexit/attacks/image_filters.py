"""Filters of one image: Gaussian, disk and motion blur, zoom about the centre, and sampling at fractional positions.

Every image is (C, H, W) floats.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float64]
Matrix = NDArray[np.float64]


def gaussian_blur(image: Image, sigma: float, *, truncate: float = 4.0, border: str = "edge") -> Image:
    """Blur with a Gaussian.

    Args:
        image: (C, H, W).
        sigma: standard deviation, pixels.
        truncate: cut-off of the kernel, standard deviations.
        border: how pixels outside are filled, a mode of `np.pad`.
    """
    rows, columns = (_gaussian_matrix(size, sigma, truncate, border) for size in image.shape[1:])
    return rows @ image @ columns.T


def disk_blur(image: Image, radius: float, alias_blur: float) -> Image:
    """Blur with a disk whose edge a small Gaussian smooths; the borders are mirrored.

    Args:
        image: (C, H, W).
        radius: of the disk, pixels.
        alias_blur: standard deviation of the small Gaussian, pixels.
    """
    kernel = _disk(radius, alias_blur)
    margin, (_, height, width) = len(kernel) // 2, image.shape
    padded = np.pad(image, ((0, 0), (margin, margin), (margin, margin)), mode="reflect")
    blurred = np.zeros_like(image)
    for y, x in np.argwhere(kernel).tolist():
        blurred += kernel[y, x] * padded[:, y : y + height, x : x + width]
    return blurred


def motion_blur(image: Image, radius: int, sigma: float, angle: float) -> Image:
    """Blur in one direction as `MotionBlurImage` of ImageMagick does: half a Gaussian of 2 x radius + 1 pixels.

    Pixels outside the image repeat its border.

    Args:
        image: (C, H, W).
        radius: of the kernel, pixels.
        sigma: standard deviation, pixels.
        angle: direction in degrees, clockwise from the x axis.
    """
    distance = np.arange(2 * radius + 1)
    weights = np.exp(-(distance**2) / (2 * sigma**2))
    turn = np.deg2rad(angle)
    down, right = (np.ceil(distance * part - 0.5).astype(np.int64) for part in (np.sin(turn), np.cos(turn)))
    reach, (_, height, width) = 2 * radius, image.shape
    padded = np.pad(image, ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    blurred = np.zeros_like(image)
    for weight, y, x in zip(weights / weights.sum(), reach + down, reach + right, strict=True):
        blurred += weight * padded[:, y : y + height, x : x + width]
    return blurred


def zoom(image: Image, factor: float) -> Image:
    """Enlarge the centre by `factor` >= 1 with linear interpolation; the size stays (C, H, W)."""
    lower, upper, share = _zoom_positions(image.shape[1], factor)
    image = (1 - share)[:, None] * image[:, lower] + share[:, None] * image[:, upper]
    lower, upper, share = _zoom_positions(image.shape[2], factor)
    return (1 - share) * image[:, :, lower] + share * image[:, :, upper]


def sample(image: Image, y: NDArray[np.float64], x: NDArray[np.float64], border: str) -> Image:
    """Read an image (C, H, W) at positions y and x, each (h, w), pixels, with linear interpolation.

    Args:
        image: (C, H, W).
        y, x: positions, pixels.
        border: "reflect" mirrors about the border pixel, "symmetric" about its outer edge.
    """
    top, left = np.floor(y), np.floor(x)
    down, right = y - top, x - left
    sampled = np.zeros((len(image), *y.shape))
    for dy, row_weight in ((0, 1 - down), (1, down)):
        for dx, column_weight in ((0, 1 - right), (1, right)):
            rows = _mirror(top.astype(np.int64) + dy, image.shape[1], border)
            columns = _mirror(left.astype(np.int64) + dx, image.shape[2], border)
            sampled += row_weight * column_weight * image[:, rows, columns]
    return sampled


@lru_cache(maxsize=64)
def _gaussian_matrix(size: int, sigma: float, truncate: float, border: str) -> Matrix:
    """The Gaussian along one axis of `size` pixels, (size, size)."""
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return np.eye(size)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    positions = np.pad(np.arange(size), radius, mode=border)  # type: ignore[call-overload]
    matrix = np.zeros((size, size))
    for offset, weight in enumerate(weights / weights.sum()):
        np.add.at(matrix, (np.arange(size), positions[offset : offset + size]), weight)
    return matrix


@lru_cache(maxsize=256)
def _zoom_positions(size: int, factor: float) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Where the pixels of an enlarged axis come from: two positions and the share of the second, each (size,).

    The crop is the smallest that fills the axis after the zoom. Its first and last pixels map to those of the result.
    """
    crop = int(np.ceil(size / factor))
    enlarged, start = round(crop * factor), (size - crop) // 2
    first = (enlarged - size) // 2
    position = np.arange(first, first + size) * (crop - 1) / max(enlarged - 1, 1)
    lower = position.astype(np.int64)
    return start + lower, start + np.minimum(lower + 1, crop - 1), position - lower


@lru_cache(maxsize=16)
def _disk(radius: float, alias_blur: float) -> Matrix:
    """A disk, smoothed over 3 pixels or, above a radius of 8, over 5; 17 pixels wide or as wide as it needs."""
    reach = max(8, int(radius))
    grid = np.arange(-reach, reach + 1)
    disk = (grid[:, None] ** 2 + grid**2 <= radius**2).astype(np.float64)
    smoothed = 1 if radius <= 8 else 2
    blurred = gaussian_blur((disk / disk.sum())[None], alias_blur, truncate=smoothed / alias_blur, border="reflect")
    return np.asarray(blurred[0])


def _mirror(index: NDArray[np.int64], size: int, border: str) -> NDArray[np.int64]:
    """Positions outside [0, size) mirrored into it."""
    if border == "symmetric":
        index = index % (2 * size)
        return np.minimum(index, 2 * size - 1 - index)
    period = max(2 * (size - 1), 1)
    index = index % period
    return np.minimum(index, period - index)
