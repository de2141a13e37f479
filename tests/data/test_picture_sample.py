"""The sample of a folder gives the median size, and whether any picture has a colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from drawn_pictures import draw
from PIL import Image

from mexit.data import registry
from mexit.data.picture_sample import PictureSample, sample_pictures
from mexit.errors import BadInput


def sample(root: Path) -> PictureSample:
    data = registry.load(f"folder:{root}")
    return sample_pictures(data, np.arange(len(data)))


@pytest.mark.parametrize(("mode", "suffix"), [("RGB", ".png"), ("P", ".gif"), ("RGB", ".jpg"), ("RGBA", ".webp")])
def test_coloured_pictures_are_not_grey(tmp_path: Path, mode: str, suffix: str) -> None:
    assert not sample(draw(tmp_path / "own", 6, mode=mode, suffix=suffix)).grey


@pytest.mark.parametrize(("mode", "suffix"), [("L", ".png"), ("1", ".png"), ("L", ".jpg"), ("LA", ".png")])
def test_pictures_without_colours_are_grey(tmp_path: Path, mode: str, suffix: str) -> None:
    assert sample(draw(tmp_path / "own", 6, mode=mode, suffix=suffix)).grey


def test_grey_pictures_stored_with_three_channels_are_grey_until_one_has_a_colour(tmp_path: Path) -> None:
    root = draw(tmp_path / "own", 6, mode="L", suffix=".jpg")
    for path in root.rglob("*.jpg"):
        Image.open(path).convert("RGB").save(path)
    assert sample(root).grey
    Image.new("RGB", (40, 40), (200, 40, 40)).save(root / "disc" / "red.png")
    assert not sample(root).grey


def test_the_size_is_the_median_height_and_width(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for width in (10, 20, 400):
            Image.new("L", (width, 2 * width)).save(tmp_path / name / f"{width}.png")
    assert sample(tmp_path).size == (40, 20)


def test_unreadable_pictures_are_left_out_and_a_folder_of_them_is_refused(tmp_path: Path) -> None:
    root = draw(tmp_path / "own", 6)
    (root / "disc" / "broken.png").write_bytes(b"no picture")
    assert sample(root).size[0] > 30
    for path in root.rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(BadInput, match="none of 13 pictures can be read"):
        sample(root)
