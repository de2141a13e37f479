"""Augmentation: padded crops and resized crops, half of them mirrored, with counter-based random numbers."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mexit.attacks.rng import CounterRNG
from mexit.flows.train import TrainOptions, train_model
from mexit.train.augment import AREA, AUGMENTS, LIGHT, MOVE, PAD, RATIO, SCALE, augment, crop_boxes

IMAGES = torch.randint(1, 256, (400, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
INDEX = torch.arange(400)


def views(image: torch.Tensor) -> dict[bytes, tuple[int, int, bool]]:
    """Every padded crop of an image, made by slicing: content to (top, left, mirrored)."""
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * PAD, width + 2 * PAD, dtype=image.dtype)
    padded[:, PAD : PAD + height, PAD : PAD + width] = image
    crops = {}
    for top in range(2 * PAD + 1):
        for left in range(2 * PAD + 1):
            cut = padded[:, top : top + height, left : left + width]
            for mirrored in (False, True):
                view = cut.flip(2) if mirrored else cut
                crops[view.contiguous().numpy().tobytes()] = (top, left, mirrored)
    return crops


def test_every_result_is_a_crop_and_all_crops_are_equally_frequent() -> None:
    counts: dict[tuple[int, int, bool], int] = {}
    known = [views(image) for image in IMAGES[:100]]
    for epoch in range(32):
        results = augment(IMAGES[:100], "crop-flip", CounterRNG(0, epoch), INDEX[:100])
        for seen, result in zip(known, results, strict=True):
            position = seen[result.contiguous().numpy().tobytes()]
            counts[position] = counts.get(position, 0) + 1
    assert len(counts) == 81 * 2
    expected = 32 * 100 / 162
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 223, "chi-squared, p < 0.001"


def test_type_and_shape_stay_and_floats_are_treated_like_bytes() -> None:
    rng = CounterRNG(0, 0)
    as_bytes = augment(IMAGES, "crop-flip", rng, INDEX)
    as_floats = augment(IMAGES.float() / 255, "crop-flip", rng, INDEX)
    assert (as_bytes.dtype, as_bytes.shape, as_floats.dtype) == (torch.uint8, IMAGES.shape, torch.float32)
    torch.testing.assert_close(as_floats, as_bytes.float() / 255)


@pytest.mark.parametrize("how", ["crop-flip", "resized-crop-flip", "photo"])
def test_the_view_depends_on_sample_epoch_and_seed_and_not_on_the_batch(how: str) -> None:
    images = IMAGES.float() / 255
    whole = augment(images, how, CounterRNG(3, 1), INDEX)
    positions = torch.tensor([311, 7])
    # Only rounding may depend on the batch: vectors of another length take other instructions.
    torch.testing.assert_close(augment(images[positions], how, CounterRNG(3, 1), positions), whole[positions])
    for rng in (CounterRNG(3, 2), CounterRNG(4, 1)):
        other = augment(images, how, rng, INDEX)
        assert (other == whole).all(dim=(1, 2, 3)).float().mean() < 0.05


def test_a_resized_crop_is_its_box_cut_out_and_scaled_back() -> None:
    """Compares with a slice and torch's bilinear interpolation, image by image."""
    images = torch.rand(200, 3, 17, 23, generator=torch.Generator().manual_seed(1))
    index = torch.arange(200)
    results = augment(images, "resized-crop-flip", CounterRNG(0, 0), index)
    assert (results.shape, results.dtype) == (images.shape, torch.float32)
    assert results.min() >= 0
    assert results.max() <= 1
    mirrored = 0
    for image, result, box in zip(images, results, crop_boxes(CounterRNG(0, 0), index, 17, 23).tolist(), strict=True):
        top, left, rows, columns = box
        cut = image[None, :, top : top + rows, left : left + columns]
        expected = F.interpolate(cut, (17, 23), mode="bilinear", align_corners=False)[0]
        straight, turned = (torch.allclose(result, one, atol=1e-4) for one in (expected, expected.flip(2)))
        assert straight != turned
        mirrored += turned
    assert 70 < mirrored < 130, "half of 200, within four standard deviations"


def test_crop_boxes_lie_in_the_image_and_have_the_areas_and_ratios_of_the_paper() -> None:
    count, side = 20_000, 224
    top, left, rows, columns = crop_boxes(CounterRNG(0, 0), torch.arange(count), side, side).double().unbind(1)
    for start, length in ((top, rows), (left, columns)):
        assert start.min() >= 0
        assert (start + length).max() <= side
        room = (start / (side - length))[length < side - 20]
        assert abs(float(room.mean()) - 0.5) < 0.02
        assert float(room.min()) < 0.01
        assert float(room.max()) > 0.99
    area, ratio = rows * columns / side**2, columns / rows
    assert float(area.min()) == pytest.approx(AREA[0], abs=0.004)
    assert float(area.max()) > 0.97
    assert float(ratio.min()) == pytest.approx(RATIO[0], abs=0.02)
    assert float(ratio.max()) == pytest.approx(RATIO[1], abs=0.02)
    # Up to three quarters of the area every ratio fits, so no box is redrawn there and areas are uniform.
    bins = torch.histogram(area[area < 0.72], 8, range=(0.08, 0.72)).hist
    expected = bins.mean()
    assert float(((bins - expected) ** 2 / expected).sum()) < 29.9, "chi-squared, 7 degrees, p < 0.0001"
    assert abs(float(ratio.log().mean())) < 0.01, "as often wide as high"


def test_an_image_that_no_crop_fits_is_used_whole() -> None:
    assert crop_boxes(CounterRNG(0, 0), INDEX, 1, 200).tolist() == [[0, 0, 1, 200]] * len(INDEX)


def test_none_returns_the_images() -> None:
    assert augment(IMAGES, "none", CounterRNG(0, 0), INDEX) is IMAGES


@pytest.fixture(scope="module")
def run_weights(tmp_path_factory: pytest.TempPathFactory):
    """The weights of one short epoch on digits with one augmentation."""
    root: Path = tmp_path_factory.mktemp("augment")

    def weights(how: str) -> dict[str, torch.Tensor]:
        given = {"method": "clean", "epochs": 1, "batch": 256, "precision": "fp32", "augment": how}
        result = train_model(settings=given, out=root / how, options=TrainOptions(threads=1))
        assert result.settings["augment"] == how
        return load_file(root / how / "weights.safetensors")

    return weights


@pytest.mark.slow
def test_training_uses_the_augmentation(run_weights) -> None:
    weights = [run_weights(how)["stages.0.trunk.0.weight"] for how in AUGMENTS]
    assert not any(torch.equal(one, other) for one, other in combinations(weights, 2))


GREY_EDGE = torch.zeros(300, 3, 24, 24)
GREY_EDGE[..., 12:] = 0.5


def test_photo_keeps_type_shape_and_range_and_changes_every_image() -> None:
    images = torch.rand(300, 3, 24, 20, generator=torch.Generator().manual_seed(2))
    results = augment(images, "photo", CounterRNG(0, 0), torch.arange(300))
    assert (results.shape, results.dtype) == (images.shape, torch.float32)
    assert results.min() >= 0
    assert results.max() <= 1
    assert not (results == images).all(dim=(1, 2, 3)).any()


def test_photo_never_mirrors_unless_it_is_told_to() -> None:
    """The right half is brighter: a mirrored image is brighter on the left."""

    def left_is_brighter(flip: bool | None) -> float:
        results = augment(GREY_EDGE, "photo", CounterRNG(0, 3), torch.arange(300), flip)
        return float((results[..., :8].mean(dim=(1, 2, 3)) > results[..., 16:].mean(dim=(1, 2, 3))).float().mean())

    assert left_is_brighter(None) == left_is_brighter(False) == 0
    assert 0.4 < left_is_brighter(True) < 0.6


def test_photo_turns_scales_and_moves_within_its_bounds() -> None:
    """A dot away from the centre moves on an arc; its distance and angle give scale and turn."""
    side, count = 101, 2000
    images = torch.zeros(1, 1, side, side)
    images[..., 50, 80] = 1.0
    images = F.max_pool2d(images, 5, 1, 2).expand(count, 1, side, side)
    results = augment(images, "photo", CounterRNG(0, 0), torch.arange(count))[:, 0]
    weights = results / results.sum(dim=(1, 2), keepdim=True)
    x = (weights.sum(dim=1) * torch.arange(side)).sum(dim=1) - 50
    y = (weights.sum(dim=2) * torch.arange(side)).sum(dim=1) - 50
    moved, turned = MOVE * side * 1.25, 0.26 * 30 * SCALE
    assert float(y.abs().max()) < moved + turned + 3
    assert 30 / SCALE - moved - 4 < float(x.min())
    assert float(x.max()) < 30 * SCALE + moved + 3
    assert abs(float(y.mean())) < 0.5, "as often up as down"
    assert float(x.std()) > 5


def test_photo_changes_brightness_and_contrast_within_a_factor() -> None:
    flat = torch.full((2000, 3, 8, 8), 0.25)
    brightness = augment(flat, "photo", CounterRNG(0, 0), torch.arange(2000)).mean(dim=(1, 2, 3)) / 0.25
    assert 1 / LIGHT - 1e-4 <= float(brightness.min()) < 1.1 / LIGHT
    assert 0.9 * LIGHT < float(brightness.max()) <= LIGHT + 1e-4
    assert abs(float(brightness.log().mean())) < 0.05, "as often darker as brighter"


@pytest.mark.parametrize("how", AUGMENTS)
def test_flip_adds_or_removes_mirror_images_of_any_augmentation(how: str) -> None:
    index = torch.arange(300)
    images = GREY_EDGE + 0.25

    def mirrored(flip: bool | None) -> float:
        results = augment(images, how, CounterRNG(1, 2), index, flip)
        return float((results[..., 6:8].sum(dim=(1, 2, 3)) > results[..., 16:18].sum(dim=(1, 2, 3))).float().mean())

    assert mirrored(False) < 0.02
    assert 0.3 < mirrored(True) < 0.6
    assert mirrored(None) == (mirrored(True) if how.endswith("flip") else mirrored(False))
