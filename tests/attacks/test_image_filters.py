"""The filters against sums written out by hand, on a single bright pixel and on real pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mexit.attacks.image_filters import disk_blur, gaussian_blur, motion_blur, sample, zoom
from mexit.data import digits

SIDE = 41
CENTRE = SIDE // 2


@pytest.fixture
def point() -> np.ndarray:
    image = np.zeros((1, SIDE, SIDE))
    image[0, CENTRE, CENTRE] = 1
    return image


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return digits.load().images.at(np.arange(3)) / 16.0


def test_a_gaussian_blur_spreads_a_point_over_a_gaussian(point) -> None:
    blurred = gaussian_blur(point, 1.5)[0]
    weights = np.array([math.exp(-(d**2) / (2 * 1.5**2)) for d in range(-6, 7)])
    weights /= weights.sum()
    expected = np.zeros((SIDE, SIDE))
    expected[CENTRE - 6 : CENTRE + 7, CENTRE - 6 : CENTRE + 7] = np.outer(weights, weights)
    np.testing.assert_allclose(blurred, expected, atol=1e-12)


@pytest.mark.parametrize("border", ["edge", "symmetric", "reflect"])
def test_a_blur_at_the_border_reads_the_padded_image(picture, border) -> None:
    radius = 6
    padded = np.pad(picture, ((0, 0), (radius, radius), (radius, radius)), mode=border)
    far = gaussian_blur(np.pad(padded, ((0, 0), (9, 9), (9, 9))), 2.0, truncate=3)
    cut = slice(9 + radius, 9 + radius + 8)
    np.testing.assert_allclose(gaussian_blur(picture, 2.0, truncate=3, border=border), far[:, cut, cut], atol=1e-12)


def test_no_sigma_is_no_blur(picture) -> None:
    np.testing.assert_array_equal(gaussian_blur(picture, 0.05), picture)


def test_a_disk_blur_spreads_a_point_over_a_smoothed_disk(point) -> None:
    sharp = np.array([[float(y * y + x * x <= 9) for x in range(-4, 5)] for y in range(-4, 5)])
    side = math.exp(-1 / (2 * 0.5**2))
    taps = np.array([side, 1, side]) / (1 + 2 * side)
    kernel = np.zeros((11, 11))
    for y, x in np.ndindex(9, 9):
        kernel[y : y + 3, x : x + 3] += sharp[y, x] * np.outer(taps, taps)
    blurred = disk_blur(point, 3, 0.5)[0]
    np.testing.assert_allclose(blurred[15:26, 15:26], kernel / sharp.sum(), atol=1e-12)
    assert blurred.sum() == pytest.approx(1)


def test_a_motion_blur_is_half_a_gaussian_in_one_direction(point) -> None:
    weights = np.array([math.exp(-(d**2) / (2 * 2.0**2)) for d in range(13)])
    weights /= weights.sum()
    for angle, step in ((0, (0, 1)), (90, (1, 0)), (-45, (-1, 1))):
        blurred = motion_blur(point, 6, 2.0, angle)[0]
        expected = np.zeros((SIDE, SIDE))
        for distance, weight in enumerate(weights):  # what lies ahead by (dy, dx) is drawn back by as much
            reach = distance if 0 in step else math.ceil(distance * math.sqrt(0.5) - 0.5)
            expected[CENTRE - step[0] * reach, CENTRE - step[1] * reach] += weight
        np.testing.assert_allclose(blurred, expected, atol=1e-12)


def test_a_motion_blur_repeats_the_border() -> None:
    ramp = np.tile(np.arange(8.0), (1, 8, 1))
    blurred = motion_blur(ramp, 6, 3.0, 0)
    np.testing.assert_allclose(blurred[..., -1], 7)
    assert (np.diff(blurred, axis=2) > 0).all()


def test_a_zoom_of_a_ramp_is_a_flatter_ramp() -> None:
    ramp = np.tile(np.arange(32.0), (1, 32, 1))
    enlarged = zoom(ramp, 2.0)
    np.testing.assert_allclose(np.diff(enlarged, axis=2), 15 / 31)
    assert enlarged[0, 0, 0] == 8
    np.testing.assert_allclose(zoom(ramp, 1.0), ramp)
    np.testing.assert_allclose(zoom(np.ones((1, 30, 44)), 1.3), 1)


def test_samples_between_pixels_are_interpolated_and_borders_mirrored(picture) -> None:
    y, x = np.mgrid[:8, :8].astype(np.float64)
    np.testing.assert_array_equal(sample(picture, y, x, "reflect"), picture)
    halves = sample(picture, y[:7, :7] + 0.5, x[:7, :7] + 0.25, "reflect")
    rows = (picture[:, :-1] + picture[:, 1:]) / 2
    np.testing.assert_allclose(halves, 0.75 * rows[:, :, :-1] + 0.25 * rows[:, :, 1:])
    for border in ("reflect", "symmetric"):
        padded = np.pad(picture, ((0, 0), (5, 5), (5, 5)), mode=border)
        beyond_y, beyond_x = np.mgrid[-5:13, -5:13].astype(np.float64)
        np.testing.assert_array_equal(sample(picture, beyond_y, beyond_x, border), padded)
