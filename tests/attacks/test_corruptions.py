"""Every corruption against its published formula, computed in another way, and what all of them have in common."""

from __future__ import annotations

import colorsys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as PillowImage

from mexit.attacks import corruptions
from mexit.attacks.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from mexit.attacks.textures import ice
from mexit.data import digits, registry, splits
from mexit.errors import UsageError
from mexit.models import model_spec

SIDE, COUNT = 28, 24
# By their published parameters these do not move every image further with each step of the severity.
NOT_MONOTONE = {"glass_blur", "motion_blur", "frost", "elastic_transform"}
# These look at one image, draw nothing, or draw the same for one channel and for three.
SAME_FOR_GREY = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "fog", "brightness", "contrast",
                 "elastic_transform", "pixelate")  # fmt: skip
DRAW_NOTHING = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}


@pytest.fixture(scope="module")
def index() -> NDArray[np.int64]:
    return splits.split(digits.load()).part("selection")[: 3 * COUNT]


@pytest.fixture(scope="module")
def grey(index: NDArray[np.int64]) -> NDArray[np.float32]:
    """Handwritten digits, (24, 1, 28, 28)."""
    return digits.load().batch(index[:COUNT], model_spec("small-cnn").input)


@pytest.fixture(scope="module")
def colour(index: NDArray[np.int64]) -> NDArray[np.float32]:
    """Three digits in the three channels of each picture, (24, 3, 28, 28)."""
    return digits.load().batch(index, model_spec("small-cnn").input).reshape(COUNT, 3, SIDE, SIDE)


def image_of(pictures: NDArray[np.float32]) -> NDArray[np.float64]:
    return pictures[0].astype(np.float64)


def generator() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_result_is_an_8_bit_image_of_the_same_shape(name, channels, grey, colour, index) -> None:
    images = (grey if channels == 1 else colour)[:4]
    for severity in SEVERITIES:
        corrupted = corrupt(images, index[:4], name, severity)
        assert corrupted.dtype == np.float32
        assert corrupted.shape == images.shape
        assert corrupted.min() >= 0
        assert corrupted.max() <= 1
        levels = corrupted.astype(np.float64) * 255
        np.testing.assert_allclose(levels, np.rint(levels), atol=1e-4)
        assert np.abs(corrupted - images).reshape(4, -1).max(axis=1).min() > 1.5 / 255, "an image stayed as it was"


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_does_not_depend_on_its_batch(name, colour, index) -> None:
    together = corrupt(colour, index[:COUNT], name, 3)
    order = np.random.default_rng(0).permutation(COUNT)
    np.testing.assert_array_equal(corrupt(colour[order], index[order], name, 3), together[order])
    np.testing.assert_array_equal(corrupt(colour[5:6], index[5:6], name, 3)[0], together[5])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_random_numbers_depend_on_seed_and_position(name, grey, index) -> None:
    first, second = np.repeat(grey[:1], 2, axis=0), index[:2]
    corrupted = corrupt(first, second, name, 4)
    assert (corrupted[0] == corrupted[1]).all() == (name in DRAW_NOTHING)
    assert (corrupt(first, second, name, 4, seed=1) == corrupted).all() == (name in DRAW_NOTHING)


# A digit enlarged from 8 x 8 pixels is itself pixelated, so `pixelate` at 0.9 fits it better than at 0.95.
@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - NOT_MONOTONE - {"pixelate"}))
def test_each_severity_moves_digits_further(name, grey, colour, index) -> None:
    for images in (grey, colour):
        distances = mean_distances(images, index[:COUNT], name)
        assert (np.diff(distances) > 0).all(), distances


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_moves_photographs_further(name, data_dir: Path) -> None:
    if not (data_dir / "cifar-10-batches-py" / "test_batch").exists():
        pytest.skip("needs CIFAR-10 as downloaded, below MEXIT_DATA")
    data = registry.load("cifar10", data_dir)
    assert data.official_test is not None
    positions = data.official_test[:40]
    distances = mean_distances(data.batch(positions, model_spec("msdnet-cifar10").input), positions, name)
    if name not in NOT_MONOTONE:
        assert (np.diff(distances) > 0).all(), distances
    assert min(distances) > 1 / 255


def mean_distances(images: NDArray[np.float32], positions: NDArray[np.int64], name: str) -> list[float]:
    """Root mean square difference to the clean image at each severity, mean over images."""
    differences = [corrupt(images, positions, name, severity) - images for severity in SEVERITIES]
    return [float(np.sqrt((one**2).mean(axis=(1, 2, 3))).mean()) for one in differences]


@pytest.mark.parametrize("name", SAME_FOR_GREY)
def test_a_grey_image_is_one_of_three_equal_channels(name, grey) -> None:
    image, corruption = image_of(grey), CORRUPTIONS[name]
    parameters = corruption.parameters(image.shape, 4)
    alone = corruption.apply(image, generator(), *parameters)
    three = corruption.apply(np.repeat(image, 3, axis=0), generator(), *parameters)
    for channel in three:
        np.testing.assert_allclose(channel, alone[0], atol=1e-12)


def test_the_size_selects_the_published_parameters() -> None:
    noise, blur = CORRUPTIONS["gaussian_noise"], CORRUPTIONS["motion_blur"]
    for side, scales, kernel in (
        (32, (0.04, 0.1), (9, 2.5)),
        (64, (0.04, 0.18), (12, 3)),
        (224, (0.08, 0.38), (20, 15)),
    ):
        assert (noise.parameters((3, side, side), 1)[0], noise.parameters((3, side, side), 5)[0]) == scales
        assert blur.parameters((3, side, side), 5) == kernel
    assert noise.parameters((1, 28, 28), 5) == noise.parameters((3, 32, 32), 5)
    assert noise.parameters((3, 100, 150), 5) == noise.parameters((3, 224, 224), 5), "the longer side counts"
    for corruption in CORRUPTIONS.values():
        assert {len(table) for table in (corruption.cifar, corruption.tiny, corruption.imagenet)} == {5}


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(3, 30, 44), (1, 72, 64), (3, 140, 100), (1, 8, 8)])
def test_every_size_works(name, shape) -> None:
    images = np.random.default_rng(0).random((1, *shape), np.float32)
    assert corrupt(images, np.array([3]), name, 5).shape == images.shape


def test_an_unknown_corruption_or_severity_is_a_usage_error(grey, index) -> None:
    for name, severity in (("rain", 1), ("fog", 6)):
        with pytest.raises(UsageError, match=rf"found {name} at severity {severity}: expected gaussian_noise, "):
            corrupt(grey[:1], index[:1], name, severity)


def test_gaussian_noise_has_the_published_deviation() -> None:
    images = np.full((8, 3, 32, 32), 0.5, np.float32)
    for severity, scale in enumerate((0.04, 0.06, 0.08, 0.09, 0.10), start=1):
        difference = corrupt(images, np.arange(8), "gaussian_noise", severity).astype(np.float64) - 0.5
        assert difference.std() == pytest.approx(scale, rel=0.03)
        assert abs(difference.mean()) < 0.003


def test_shot_noise_has_the_variance_of_photons() -> None:
    for level in (0.2, 0.5, 0.8):
        values = corruptions.shot_noise(np.full((3, 100, 100), level), generator(), 60)
        assert values.mean() == pytest.approx(level, rel=0.01)
        assert values.var() == pytest.approx(level / 60, rel=0.05)
        np.testing.assert_allclose(values * 60, np.rint(values * 60), atol=1e-9)


def test_impulse_noise_turns_a_share_of_the_values_white_or_black() -> None:
    values = corruptions.impulse_noise(np.full((3, 200, 200), 0.5), generator(), 0.07)
    assert set(np.unique(values)) == {0, 0.5, 1}
    assert (values == 1).mean() == pytest.approx(0.035, rel=0.05)
    assert (values == 0).mean() == pytest.approx(0.035, rel=0.05)
    assert 0.05 < ((values[0] != 0.5) & (values[1] != 0.5)).mean() / 0.07 < 0.09, "channels are hit independently"


def test_glass_blur_copies_pixels_from_nearby() -> None:
    """Sigma 0.05 does not blur, so every pixel is a pixel of the image one step up, left, both or none."""
    places = np.arange(SIDE * SIDE, dtype=np.float64).reshape(1, SIDE, SIDE)
    origin = corruptions.glass_blur(places, generator(), 0.05, 1, 1).astype(np.int64)[0]
    rows, columns = np.mgrid[:SIDE, :SIDE]
    down, right = origin // SIDE - rows, origin % SIDE - columns
    assert set(np.unique(down)) == set(np.unique(right)) == {-1, 0}
    for border in (down[:2], down[:, :2], right[:2], right[:, :2]):
        assert not border.any()
    inside = down[2:, 2:]
    assert inside.mean() == pytest.approx(-0.5, abs=0.06)
    twice = corruptions.glass_blur(places, generator(), 0.05, 1, 2).astype(np.int64)[0]
    assert (rows - twice // SIDE).max() == 2


def test_motion_blur_stays_within_45_degrees() -> None:
    """A single point becomes a line: its spread along x is at least that along y."""
    image = np.zeros((1, 41, 41))
    image[0, 20, 20] = 1
    angles = []
    for seed in range(40):
        _, y, x = np.nonzero(corruptions.directional_blur(image, np.random.default_rng(seed), 8, 2) > 1e-3)
        assert np.ptp(x) >= np.ptp(y)
        angles.append((y - 20).mean())
    assert min(angles) < -1
    assert max(angles) > 1


def test_zoom_blur_is_the_mean_of_zooms(colour) -> None:
    image = image_of(colour)
    total, factors = image.copy(), (1.0, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06)  # 1.06 is rounded into the range
    for factor in factors:
        crop = int(np.ceil(SIDE / factor))
        start, enlarged = (SIDE - crop) // 2, round(crop * factor)
        grid = np.linspace(0, crop - 1, enlarged)[(enlarged - SIDE) // 2 :][:SIDE] + start
        for number, channel in enumerate(image):
            rows = np.stack([np.interp(grid, np.arange(SIDE), column) for column in channel.T], axis=1)
            total[number] += np.stack([np.interp(grid, np.arange(SIDE), row) for row in rows])
    parameters = CORRUPTIONS["zoom_blur"].parameters(image.shape, 1)
    np.testing.assert_allclose(corruptions.zoom_blur(image, generator(), *parameters), total / 8, atol=1e-12)


def test_snow_whitens_and_adds_flakes_twice(colour) -> None:
    image, keep = image_of(colour), 0.8
    snowed = corruptions.snow(image, generator(), 0.3, 0.3, 1.25, 0.65, 14, 12, keep)
    bare = corruptions.snow(image, generator(), -9, 0.3, 1.25, 0.65, 14, 12, keep)
    grey = np.asarray([PillowImage.fromarray(np.moveaxis(image * 255, 0, 2).round().astype(np.uint8)).convert("L")])
    expected = keep * image + (1 - keep) * np.maximum(image, 1.5 * grey / 255 + 0.5)
    np.testing.assert_allclose(bare, expected, atol=0.002)
    flakes = snowed - bare
    assert flakes.min() > -1e-12
    assert flakes.max() > 0.1
    np.testing.assert_allclose(flakes, flakes[:, ::-1, ::-1], atol=1e-12)


def test_frost_adds_a_share_of_the_pane(colour) -> None:
    image = image_of(colour)
    pane = ice(image.shape[1:], 3, generator())
    np.testing.assert_allclose(corruptions.frost(image, generator(), 0.75, 0.45), 0.75 * image + 0.45 * pane)


def test_fog_lies_between_none_and_the_full_thickness() -> None:
    value, thickness = 0.4, 1.5
    fogged = corruptions.fog(np.full((3, 32, 32), value), generator(), thickness, 1.75)
    cloud = (fogged * (value + thickness) / value - value) / thickness
    assert cloud.min() == pytest.approx(0, abs=1e-12)
    assert cloud.max() == pytest.approx(1)
    assert fogged.max() == pytest.approx(value), "the brightest value stays"


def test_brightness_raises_the_value_of_hsv(colour) -> None:
    image = image_of(colour)
    image[:, 0, 0] = 0
    for severity, shift in enumerate((0.05, 0.1, 0.15, 0.2, 0.3), start=1):
        brighter = CORRUPTIONS["brightness"].apply(image, generator(), *CORRUPTIONS["brightness"].cifar[severity - 1])
        for y, x in np.ndindex(SIDE, SIDE):
            hue, saturation, value = colorsys.rgb_to_hsv(*image[:, y, x])
            expected = colorsys.hsv_to_rgb(hue, saturation, min(value + shift, 1))
            np.testing.assert_allclose(brighter[:, y, x], expected, atol=1e-12)


def test_contrast_scales_around_the_mean_of_each_channel(colour) -> None:
    image = image_of(colour)
    flat = corruptions.contrast(image, generator(), 0.15)
    for before, after in zip(image, flat, strict=True):
        assert after.mean() == pytest.approx(before.mean())
        assert after.std() == pytest.approx(0.15 * before.std())
        assert np.corrcoef(before.ravel(), after.ravel())[0, 1] == pytest.approx(1)


def test_elastic_transform_moves_pixels_by_less_than_its_bounds() -> None:
    side, margin = 32, 8
    ramps = np.mgrid[:side, :side].astype(np.float64)
    inside = (slice(None), slice(margin, -margin), slice(margin, -margin))
    smooth = corruptions.elastic_transform(ramps, generator(), 0.1, 0.03, 0) - ramps
    assert 0.2 < np.abs(smooth[inside]).max() <= 0.1 * side
    affine = corruptions.elastic_transform(ramps, generator(), 0, 0, 0.08)
    bends = np.diff(affine[inside], n=2, axis=1)
    np.testing.assert_allclose(bends, 0, atol=1e-9, err_msg="an affine map is straight")
    moved = np.abs(affine - ramps)[:, 16, 16]
    assert 0 < moved.max() <= 0.08 * side * 1.5, "the centre moves less than a corner of the triangle and a half"


def test_elastic_transform_moves_three_points_to_where_it_was_told() -> None:
    """The first numbers are the movements of the three points; the picture of a point is found at its new place."""
    side = 32
    ramps = np.mgrid[:side, :side].astype(np.float64)
    affine = corruptions.elastic_transform(ramps, generator(), 0, 0, 0.08)
    shifts = generator().uniform(-0.08 * side, 0.08 * side, (3, 2))
    for point, shift in zip(((26, 26), (26, 6), (6, 6)), shifts, strict=True):
        x, y = np.asarray(point) + shift
        for plane, expected in zip(affine, (point[1], point[0]), strict=True):
            top, left = int(y), int(x)
            cell = plane[top : top + 2, left : left + 2]
            value = np.array([1 - (y - top), y - top]) @ cell @ np.array([1 - (x - left), x - left])
            assert value == pytest.approx(expected, abs=0.05)


def test_pixelate_shows_the_means_of_blocks(colour) -> None:
    image = np.round(image_of(colour) * 255) / 255
    means = image.reshape(3, 14, 2, 14, 2).mean(axis=(2, 4))
    blocks = corruptions.pixelate(image, generator(), 0.5)
    np.testing.assert_allclose(blocks, np.kron(means, np.ones((1, 2, 2))), atol=1.01 / 255)
    sizes = []
    for (factor,) in CORRUPTIONS["pixelate"].cifar:
        blocks = corruptions.pixelate(image, generator(), factor)
        sizes.append(len(np.unique(blocks[0], axis=0)))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= int(SIDE * 0.65)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_equals_a_round_trip_through_pillow(channels, grey, colour, index) -> None:
    images = (grey if channels == 1 else colour)[:1]
    levels = np.round(images[0] * 255).astype(np.uint8)
    picture = PillowImage.fromarray(levels[0] if channels == 1 else np.moveaxis(levels, 0, 2))
    for severity, quality in enumerate((80, 65, 58, 50, 40), start=1):
        stream = BytesIO()
        picture.save(stream, "JPEG", quality=quality)
        decoded = np.asarray(PillowImage.open(stream)).reshape(SIDE, SIDE, channels)
        corrupted = corrupt(images, index[:1], "jpeg_compression", severity)[0]
        np.testing.assert_array_equal(np.round(corrupted * 255), np.moveaxis(decoded, 2, 0))
