"""Augmentation: a crop of the padded image, mirrored or not, decided by counter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mexit.flows.train import train
from mexit.train.augment import PAD, augment
from mexit.train.randomness import Draw

IMAGES = torch.randint(1, 256, (400, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
INDEX = torch.arange(400)


def views(image: torch.Tensor) -> dict[bytes, tuple[int, int, bool]]:
    """Every view that an image can have, made by slicing: content to (top, left, mirrored)."""
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * PAD, width + 2 * PAD, dtype=image.dtype)
    padded[:, PAD : PAD + height, PAD : PAD + width] = image
    found = {}
    for top in range(2 * PAD + 1):
        for left in range(2 * PAD + 1):
            cut = padded[:, top : top + height, left : left + width]
            for mirrored in (False, True):
                seen = cut.flip(2) if mirrored else cut
                found[seen.contiguous().numpy().tobytes()] = (top, left, mirrored)
    return found


def test_every_result_is_a_view_and_every_view_comes_about_equally_often() -> None:
    counts: dict[tuple[int, int, bool], int] = {}
    known = [views(image) for image in IMAGES[:100]]
    for epoch in range(32):
        results = augment(IMAGES[:100], "crop-flip", Draw(0, epoch), INDEX[:100])
        for seen, result in zip(known, results, strict=True):
            place = seen[result.contiguous().numpy().tobytes()]
            counts[place] = counts.get(place, 0) + 1
    assert len(counts) == 81 * 2
    expected = 32 * 100 / 162
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 223, "chi-squared, p < 0.001"


def test_type_and_shape_stay_and_floats_are_treated_like_bytes() -> None:
    draw = Draw(0, 0)
    as_bytes = augment(IMAGES, "crop-flip", draw, INDEX)
    as_floats = augment(IMAGES.float() / 255, "crop-flip", draw, INDEX)
    assert (as_bytes.dtype, as_bytes.shape, as_floats.dtype) == (torch.uint8, IMAGES.shape, torch.float32)
    torch.testing.assert_close(as_floats, as_bytes.float() / 255)


def test_the_view_depends_on_sample_epoch_and_seed_and_not_on_the_batch() -> None:
    whole = augment(IMAGES, "crop-flip", Draw(3, 1), INDEX)
    places = torch.tensor([311, 7])
    assert torch.equal(augment(IMAGES[places], "crop-flip", Draw(3, 1), places), whole[places])
    for draw in (Draw(3, 2), Draw(4, 1)):
        other = augment(IMAGES, "crop-flip", draw, INDEX)
        assert (other == whole).all(dim=(1, 2, 3)).float().mean() < 0.05


def test_none_leaves_images_alone() -> None:
    assert augment(IMAGES, "none", Draw(0, 0), INDEX) is IMAGES


@pytest.fixture(scope="module")
def run_weights(tmp_path_factory: pytest.TempPathFactory):
    """The weights of one short epoch on digits with one augmentation."""
    root: Path = tmp_path_factory.mktemp("augment")

    def weights(how: str) -> dict[str, torch.Tensor]:
        given = {"method": "clean", "epochs": 1, "batch": 256, "recipe": "fp32", "augment": how}
        result = train(given=given, out=root / how, threads=1)
        assert result.settings["augment"] == how
        return load_file(root / how / "weights.safetensors")

    return weights


def test_the_loop_trains_on_the_views(run_weights) -> None:
    plain, augmented = run_weights("none"), run_weights("crop-flip")
    assert not torch.equal(plain["stages.0.trunk.0.weight"], augmented["stages.0.trunk.0.weight"])
