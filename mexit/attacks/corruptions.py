"""The 15 common corruptions at 5 severities of D. Hendrycks and T. Dietterich, ICLR 2019 (arXiv:1903.12261).

Formulas and parameters are those of the authors' programs `make_cifar_c.py`, `make_tinyimagenet_c.py` and
`imagenet_c/corruptions.py`. The longer side of the image selects the parameters: CIFAR-10-C up to 48 pixels,
Tiny-ImageNet-C up to 128, ImageNet-C above. Lengths in pixels are not scaled further.

Differences from the programs:
- `frost` has no photographs: `textures.ice` generates a pane with their mean brightness, contrast and tint.
- `motion_blur` and `snow` use our own form of ImageMagick's kernel.
- The result is rounded to 8 bits; the programs cut off the fraction, which is half a level darker on average.
- Random numbers depend on seed, corruption, severity and the position of the image alone, not on the batch.

A grey image, of one channel, is treated as an image of three equal channels would be, with one draw of noise. In
`frost` the pane is grey as well, and `brightness` adds to the grey value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from mexit.attacks.image_filters import Image, disk_blur, gaussian_blur, motion_blur, sample, zoom
from mexit.attacks.textures import flakes, ice, plasma
from mexit.errors import UsageError

SEVERITIES = (1, 2, 3, 4, 5)
LEVELS = 255
LUMA = np.array([0.299, 0.587, 0.114])[:, None, None]  # ITU-R BT.601

Generator = np.random.Generator
Severities = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Corruption:
    """One corruption.

    Attributes:
        apply: image (C, H, W) in [0, 1], random numbers and parameters to the image, which may leave [0, 1].
        cifar, tiny, imagenet: parameters at severities 1 to 5, for images of up to 48, up to 128 and more pixels.
    """

    apply: Callable[..., Image]
    cifar: Severities
    tiny: Severities
    imagenet: Severities

    def parameters(self, shape: tuple[int, ...], severity: int) -> tuple[float, ...]:
        """The parameters for images of `shape` (C, H, W) at a severity from 1 to 5."""
        side = max(shape[1:])
        table = self.cifar if side <= 48 else self.tiny if side <= 128 else self.imagenet
        return table[severity - 1]


def corrupt(
    images: NDArray[np.float32], index: NDArray[np.int64], name: str, severity: int, *, seed: int = 0
) -> NDArray[np.float32]:
    """Corrupt images.

    Args:
        images: (B, C, H, W) float32 in [0, 1], 1 or 3 channels.
        index: positions in the data set, (B,); they select the random numbers.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: seed of the random numbers.

    Returns:
        (B, C, H, W) float32 in [0, 1], rounded to 8 bits.

    Raises:
        UsageError: an unknown corruption or severity.
    """
    if name not in CORRUPTIONS or severity not in SEVERITIES:
        raise UsageError(f"found {name} at severity {severity}: expected {', '.join(CORRUPTIONS)} at 1 to 5")
    corruption = CORRUPTIONS[name]
    parameters = corruption.parameters(images.shape[1:], severity)
    corrupted = np.empty(images.shape, np.uint8)
    for row, (image, position) in enumerate(zip(images, index.tolist(), strict=True)):
        rng = np.random.default_rng([seed, severity, position, *name.encode()])
        corrupted[row] = _to_uint8(corruption.apply(image.astype(np.float64), rng, *parameters))
    return corrupted.astype(np.float32) / np.float32(LEVELS)


def gaussian_noise(image: Image, rng: Generator, scale: float) -> Image:
    """Add normal noise of standard deviation `scale`."""
    return image + rng.normal(0, scale, image.shape)


def shot_noise(image: Image, rng: Generator, photons: float) -> Image:
    """Draw each pixel from a Poisson distribution; white is `photons` on average."""
    return rng.poisson(image * photons) / photons


def impulse_noise(image: Image, rng: Generator, share: float) -> Image:
    """Set a share of the values to 0 or 1, both equally likely, each channel by itself."""
    hit, white = rng.random(image.shape) < share, rng.random(image.shape) < 0.5
    return np.where(hit, white, image)


def defocus_blur(image: Image, _: Generator, radius: float, alias_blur: float) -> Image:
    """Blur with a disk (see `disk_blur`)."""
    return disk_blur(image, radius, alias_blur)


def glass_blur(image: Image, rng: Generator, sigma: float, reach: int, iterations: int) -> Image:
    """Blur, move pixels to random places nearby, blur again.

    The published program means to swap each pixel with a random neighbour, row by row from the lower right. Its two
    sides share memory, so it copies the neighbour and leaves it in place. CIFAR-10-C was made that way, and so is this.

    Args:
        image: (C, H, W).
        rng: random numbers.
        sigma: standard deviation of the two blurs, pixels.
        reach: a neighbour is -reach to reach - 1 pixels away in both directions.
        iterations: number of passes over the image.
    """
    blurred = gaussian_blur(image, sigma)
    channels, height, width = image.shape
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    places = (rows[:, None] * width + columns).ravel()
    origin = list(range(height * width))
    for _ in range(iterations):
        right, down = rng.integers(-reach, reach, (len(places), 2)).T
        for place, neighbour in zip(places.tolist(), (places + down * width + right).tolist(), strict=True):
            origin[place] = origin[neighbour]
    moved = blurred.reshape(channels, -1)[:, origin].reshape(image.shape)
    return gaussian_blur(moved, sigma)


def directional_blur(image: Image, rng: Generator, radius: int, sigma: float) -> Image:
    """Blur along a random direction within 45 degrees of the horizontal."""
    return motion_blur(image, radius, sigma, rng.uniform(-45, 45))


def zoom_blur(image: Image, _: Generator, stop: float, step: float) -> Image:
    """Average the image with its zooms by 1, 1 + step, ... up to `stop`, as `np.arange` counts them in the programs."""
    factors = np.arange(1, stop, step).tolist()
    total = image + sum(zoom(image, factor) for factor in factors)
    return np.asarray(total / (len(factors) + 1))


def snow(
    image: Image,
    rng: Generator,
    mean: float,
    deviation: float,
    enlarge: float,
    threshold: float,
    radius: int,
    sigma: float,
    keep: float,
) -> Image:
    """Whiten the image by the share 1 - keep, then add flakes and the same flakes upside down (see `flakes`)."""
    layer = flakes(image.shape[1:], (mean, deviation), enlarge, threshold, (radius, sigma), rng)
    grey = (LUMA * image).sum(axis=0) if len(image) == 3 else image
    whitened = keep * image + (1 - keep) * np.maximum(image, 1.5 * grey + 0.5)
    return whitened + layer + layer[:, ::-1, ::-1]


def frost(image: Image, rng: Generator, keep: float, share: float) -> Image:
    """Weigh the image by `keep` and add `share` of a generated pane of ice."""
    return keep * image + share * ice(image.shape[1:], len(image), rng)


def fog(image: Image, rng: Generator, thickness: float, decay: float) -> Image:
    """Add a plasma cloud and scale back to the brightest value of the image."""
    brightest = image.max()
    clouded = image + thickness * plasma(image.shape[1:], decay, rng)
    return np.asarray(clouded * brightest / (brightest + thickness))


def brightness(image: Image, _: Generator, shift: float) -> Image:
    """Add `shift` to the value in HSV, up to 1; hue and saturation stay."""
    value = image.max(axis=0, keepdims=True)
    raised = np.minimum(value + shift, 1)
    return np.asarray(np.where(value > 0, image * raised / np.where(value > 0, value, 1), raised))


def contrast(image: Image, _: Generator, factor: float) -> Image:
    """Scale the distance to the mean of each channel."""
    mean = image.mean(axis=(1, 2), keepdims=True)
    return np.asarray((image - mean) * factor + mean)


def elastic_transform(image: Image, rng: Generator, stretch: float, smooth: float, shift: float) -> Image:
    """Move three points at random by an affine map, then every pixel by a smooth random field.

    Args:
        image: (C, H, W).
        rng: random numbers.
        stretch: factor of the smoothed field of numbers in [-1, 1], and so its bound, share of the shorter side.
        smooth: standard deviation of the smoothing, share of the shorter side.
        shift: largest movement of the three points along x and y, share of the shorter side.
    """
    _, height, width = image.shape
    side, (y, x) = min(height, width), np.mgrid[:height, :width].astype(np.float64)
    inverse = _inverse_affine(height, width, shift * side, rng)
    source_x, source_y = (row[0] * x + row[1] * y + row[2] for row in inverse)
    moved = sample(image, source_y, source_x, "reflect")
    field = rng.uniform(-1, 1, (2, height, width))
    if stretch == 0:
        return moved
    dx, dy = stretch * side * gaussian_blur(field, smooth * side, truncate=3, border="symmetric")
    return sample(moved, y + dy, x + dx, "symmetric")


def pixelate(image: Image, _: Generator, factor: float) -> Image:
    """Shrink and enlarge with Pillow's box filter."""
    _, height, width = image.shape
    small = (max(1, int(width * factor)), max(1, int(height * factor)))
    box = PillowImage.Resampling.BOX
    return _from_pillow(_to_pillow(image).resize(small, box).resize((width, height), box))


def jpeg_compression(image: Image, _: Generator, quality: int) -> Image:
    """Encode and decode as JPEG with Pillow."""
    buffer = BytesIO()
    _to_pillow(image).save(buffer, "JPEG", quality=quality)
    return _from_pillow(PillowImage.open(buffer))


def _inverse_affine(height: int, width: int, shift: float, rng: Generator) -> NDArray[np.float64]:
    """The map (2, 3) from result (x, y, 1) to source that moves three points around the centre by up to `shift`."""
    centre, reach = np.array([width // 2, height // 2]), min(height, width) // 3
    corners = centre + reach * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + rng.uniform(-shift, shift, corners.shape)
    homogeneous = np.column_stack([moved, np.ones(3)])
    return np.asarray(np.linalg.solve(homogeneous, corners).T)


def _to_uint8(image: Image) -> NDArray[np.uint8]:
    return np.asarray(np.rint(image.clip(0, 1) * LEVELS), np.uint8)


def _to_pillow(image: Image) -> PillowImage.Image:
    pixels = _to_uint8(image)
    return PillowImage.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2))


def _from_pillow(picture: PillowImage.Image) -> Image:
    pixels = np.asarray(picture, np.float64) / LEVELS
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)


def _each(*values: float) -> Severities:
    return tuple((value,) for value in values)


def _imagenet_elastic(*rows: tuple[float, float, float]) -> Severities:
    """Shares of the side; the published program takes them of 244 pixels for images of 224."""
    return tuple(tuple(244 / 224 * value for value in row) for row in rows)


CORRUPTIONS: Mapping[str, Corruption] = {
    "gaussian_noise": Corruption(
        gaussian_noise,
        _each(0.04, 0.06, 0.08, 0.09, 0.10),
        _each(0.04, 0.08, 0.12, 0.15, 0.18),
        _each(0.08, 0.12, 0.18, 0.26, 0.38),
    ),
    "shot_noise": Corruption(
        shot_noise, _each(500, 250, 100, 75, 50), _each(250, 100, 50, 30, 15), _each(60, 25, 12, 5, 3)
    ),
    "impulse_noise": Corruption(
        impulse_noise,
        _each(0.01, 0.02, 0.03, 0.05, 0.07),
        _each(0.01, 0.02, 0.05, 0.08, 0.14),
        _each(0.03, 0.06, 0.09, 0.17, 0.27),
    ),
    "defocus_blur": Corruption(
        defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": Corruption(
        glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": Corruption(
        directional_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": Corruption(
        zoom_blur,
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": Corruption(
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": Corruption(
        frost,
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    "fog": Corruption(
        fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": Corruption(
        brightness, _each(0.05, 0.1, 0.15, 0.2, 0.3), _each(0.1, 0.2, 0.3, 0.4, 0.5), _each(0.1, 0.2, 0.3, 0.4, 0.5)
    ),
    "contrast": Corruption(
        contrast, _each(0.75, 0.5, 0.4, 0.3, 0.15), _each(0.4, 0.3, 0.2, 0.1, 0.05), _each(0.4, 0.3, 0.2, 0.1, 0.05)
    ),
    "elastic_transform": Corruption(
        elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        ((0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02)),
        _imagenet_elastic((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    ),
    "pixelate": Corruption(
        pixelate, _each(0.95, 0.9, 0.85, 0.75, 0.65), _each(0.9, 0.8, 0.7, 0.6, 0.5), _each(0.6, 0.5, 0.4, 0.3, 0.25)
    ),
    "jpeg_compression": Corruption(
        jpeg_compression, _each(80, 65, 58, 50, 40), _each(65, 58, 50, 40, 25), _each(25, 18, 15, 10, 7)
    ),
}
