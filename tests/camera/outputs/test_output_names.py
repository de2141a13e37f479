"""Names of cameras and times in names of files and topics."""

from __future__ import annotations

import re
from datetime import datetime, timezone

import pytest

from mexit.camera.outputs.output_names import FILE_TIME, camera_slug, camera_slugs, file_time
from mexit.errors import UsageError


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("gate", "gate"),
        ("Front door", "front_door"),
        ("rtsp://10.0.0.5/live", "rtsp_10_0_0_5_live"),
        ("a/+/#", "a"),
        ("cam-2", "cam-2"),
    ],
)
def test_names_of_cameras(name: str, slug: str) -> None:
    assert camera_slug(name) == slug


def test_other_letters_and_long_names_stay_distinct() -> None:
    names = ["门口", "后门", "cam 门", "cam 口", "ß", "//", "x" * 100, "x" * 101]
    slugs = list(camera_slugs(names).values())
    assert len(set(slugs)) == len(names)
    assert all(len(slug) <= 80 and slug.isascii() and "/" not in slug for slug in slugs)


def test_two_cameras_with_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match=r"cameras 'Front door' and 'front/door' have the same name .* front_door"):
        camera_slugs(["Front door", "hall", "front/door"])


def test_times_sort_as_text() -> None:
    times = [datetime(2026, 1, 31, 23, 59, 59, micro, timezone.utc) for micro in (0, 1000, 99_999, 999_999)]
    texts = [file_time(time) for time in times]
    assert texts == sorted(texts)
    assert texts[-1] == "20260131T235959.999Z"
    assert all(re.fullmatch(FILE_TIME, text) for text in texts)
