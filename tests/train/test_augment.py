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
from mexit.train.augment import AREA, AUGMENTS, PAD, RATIO, augment, crop_boxes

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


@pytest.mark.parametrize("how", ["crop-flip", "resized-crop-flip"])
def test_the_view_depends_on_sample_epoch_and_seed_and_not_on_the_batch(how: str) -> None:
    images = IMAGES.float() / 255
    whole = augment(images, how, CounterRNG(3, 1), INDEX)
    positions = torch.tensor([311, 7])
    assert torch.equal(augment(images[positions], how, CounterRNG(3, 1), positions), whole[positions])
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
