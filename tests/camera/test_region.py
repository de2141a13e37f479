"""The region of interest: notation, pixels, errors."""

from __future__ import annotations

import numpy as np
import pytest

from mexit.camera.region import Region
from mexit.errors import BadInput, UsageError

PICTURE = np.arange(12 * 16 * 3, dtype=np.uint8).reshape(12, 16, 3)


@pytest.mark.parametrize(
    ("text", "rows", "columns"),
    [
        ("0,0,1,1", (0, 12), (0, 16)),
        ("0.25,0.5,0.5,0.25", (6, 9), (4, 12)),
        ("0.1,0.1,0.01,0.01", (1, 2), (1, 2)),
        ("2,3,4,5", (3, 8), (2, 6)),
        (" 10, 8, 100, 100", (8, 12), (10, 16)),
        ("0,0,1,2", (0, 2), (0, 1)),
    ],
)
def test_crop(text: str, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    cropped = Region.parse(text).crop(PICTURE)
    assert np.array_equal(cropped, PICTURE[slice(*rows), slice(*columns)])


def test_shares_follow_the_size_of_the_picture() -> None:
    region = Region(0.5, 0.5, 0.5, 0.5)
    assert region.box(100, 200) == (100, 50, 200, 100)
    assert region.box(480, 640) == (320, 240, 640, 480)
    assert Region(1 / 3, 1 / 3, 2 / 3, 2 / 3).box(90, 90) == (30, 30, 90, 90)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("left half", "region 'left half': expected x,y,width,height"),
        ("1,2,3", "a region has 4 numbers, found 3"),
        ("-1,0,5,5", "no number may be below 0"),
        ("nan,0,5,5", "no number may be below 0"),
        ("0,0,0,5", "region 0,0,0,5 is empty"),
        ("0.5,0,0.6,1", "ends outside the picture"),
        ("0.5,0,100,100", "mixes shares and pixels"),
    ],
)
def test_wrong_regions_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Region.parse(text)


def test_a_region_outside_the_picture() -> None:
    with pytest.raises(BadInput, match="the region 20,0,5,5 lies outside the picture of 16 x 12 pixels"):
        Region(20, 0, 5, 5).crop(PICTURE)
