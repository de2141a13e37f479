"""Random textures for the weather corruptions: plasma for fog, ice for frost, flakes for snow."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mexit.attacks.image_filters import gaussian_blur, motion_blur, zoom

Texture = NDArray[np.float64]

# Mean colour of the published photographs of frost, relative to their brightness, and the range of the latter.
ICE_TINT = np.array([0.88, 1.02, 1.09])
ICE_BRIGHTNESS = (0.45, 0.8)
ICE_CONTRAST = 0.06
ICE_DIRECTIONS = 4


def plasma(shape: tuple[int, int], decay: float, rng: np.random.Generator) -> Texture:
    """A cloud by the diamond-square algorithm on a torus (A. Fournier, D. Fussell, L. Carpenter, CACM 1982).

    Args:
        shape: (H, W) of the result; the algorithm runs on the next power of two and is cropped.
        decay: the noise shrinks by decay squared from one scale to the next finer one.
        rng: source of the noise.

    Returns:
        (H, W) in [0, 1]; 0 and 1 are reached before the crop.
    """
    step = 1 << (max(shape) - 1).bit_length()
    heights, amplitude = np.zeros((step, step)), 1.0
    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        right, below = np.roll(corners, -1, axis=1), np.roll(corners, -1, axis=0)

        def noise(size: int = len(corners), amplitude: float = amplitude) -> Texture:
            return rng.uniform(-amplitude, amplitude, (size, size))

        centres = (corners + right + below + np.roll(right, -1, axis=0)) / 4 + noise()
        heights[::step, half::step] = (corners + right + centres + np.roll(centres, 1, axis=0)) / 4 + noise()
        heights[half::step, ::step] = (corners + below + centres + np.roll(centres, 1, axis=1)) / 4 + noise()
        heights[half::step, half::step] = centres
        step, amplitude = half, amplitude / decay**2
    heights -= heights.min()
    return np.asarray(heights / max(heights.max(), 1e-12))[: shape[0], : shape[1]]


def ice(shape: tuple[int, int], channels: int, rng: np.random.Generator) -> Texture:
    """A pane of frost: needles in random directions, of an eighth of the longer side, over a cloudy bluish ground.

    Brightness, contrast and tint are about those of the photographs of the published program. Grey images get the
    brightness alone.

    Args:
        shape: (H, W).
        channels: 1 or 3.
        rng: source of the noise.

    Returns:
        (channels, H, W) in [0, 1].
    """
    reach, thickness = max(1, max(shape) // 8), max(shape) / 64
    margin = 2 * reach  # the blur repeats the border, which shows as streaks
    padded = (shape[0] + 2 * margin, shape[1] + 2 * margin)
    seeds = gaussian_blur(rng.normal(size=(ICE_DIRECTIONS, *padded)), thickness)
    turned = zip(seeds, rng.uniform(0, 360, ICE_DIRECTIONS), strict=True)
    needles = [motion_blur(layer[None], reach, reach / 2, angle)[0] for layer, angle in turned]
    crystals = np.max(needles, axis=0)[margin:-margin, margin:-margin]
    relief = _standardised(crystals) + _standardised(plasma(shape, 1.7, rng))
    brightness = rng.uniform(*ICE_BRIGHTNESS) + ICE_CONTRAST * _standardised(relief)
    tint = ICE_TINT if channels == 3 else np.ones(1)
    return np.clip(tint[:, None, None] * brightness, 0, 1)


def flakes(
    shape: tuple[int, int],
    density: tuple[float, float],
    enlarge: float,
    threshold: float,
    motion: tuple[int, float],
    rng: np.random.Generator,
) -> Texture:
    """Falling snow: enlarged specks of noise, blurred along a steep random direction.

    Args:
        shape: (H, W).
        density: mean and standard deviation of the noise.
        enlarge: zoom of the noise.
        threshold: noise below it becomes 0.
        motion: radius and standard deviation of the blur, pixels.
        rng: source of the noise and of the direction.

    Returns:
        (1, H, W) in [0, 1].
    """
    noise = zoom(rng.normal(*density, (1, *shape)), enlarge)
    specks = np.where(noise < threshold, 0, noise).clip(0, 1)
    return motion_blur(specks, *motion, angle=rng.uniform(-135, -45))


def _standardised(texture: Texture) -> Texture:
    """A texture with mean 0 and standard deviation 1."""
    return np.asarray((texture - texture.mean()) / max(float(texture.std()), 1e-12))
