"""A size limit for files whose names begin with the time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mexit.camera.outputs.disk_quota import DiskQuota
from mexit.errors import MexitError, UsageError

PATTERN = re.compile(r"\d+\.(png|json)")


def write(folder: Path, *names: str) -> list[Path]:
    """Files of 400 bytes."""
    for name in names:
        (folder / name).write_bytes(bytes(400))
    return [folder / name for name in names]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_oldest_files_are_removed_together(tmp_path: Path) -> None:
    quota = DiskQuota(tmp_path, PATTERN, max_mb=0.0017)
    for i in range(4):
        quota.add(*write(tmp_path, f"{i}.png", f"{i}.json"))
    assert names(tmp_path) == ["2.json", "2.png", "3.json", "3.png"]
    assert quota.bytes == 1600


def test_files_of_an_earlier_run_count_and_other_files_stay(tmp_path: Path) -> None:
    write(tmp_path, "0.png", "0.json", "1.png", "1.json", "notes.txt", "0.jpg")
    quota = DiskQuota(tmp_path, PATTERN, max_mb=0.001)
    assert quota.bytes == 1600
    quota.add(*write(tmp_path, "2.png", "2.json"))
    assert names(tmp_path) == ["0.jpg", "2.json", "2.png", "notes.txt"]


def test_the_newest_file_stays_even_if_it_is_too_large(tmp_path: Path) -> None:
    quota = DiskQuota(tmp_path, PATTERN, max_mb=0.0001)
    quota.add(*write(tmp_path, "0.png"))
    assert names(tmp_path) == ["0.png"]


def test_files_that_were_moved_away_are_no_error(tmp_path: Path) -> None:
    quota = DiskQuota(tmp_path, PATTERN, max_mb=0.0005)
    [path] = write(tmp_path, "0.png")
    quota.add(path)
    path.unlink()
    quota.add(*write(tmp_path, "1.png"))
    assert names(tmp_path) == ["1.png"]


def test_a_file_that_cannot_be_removed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "0.png").mkdir()
    quota = DiskQuota(tmp_path, PATTERN, max_mb=0.0001)
    with pytest.raises(MexitError, match=r"could not remove .*0\.png, which exceeds the quota"):
        quota.add(*write(tmp_path, "1.png"))


def test_a_missing_folder_is_empty(tmp_path: Path) -> None:
    assert DiskQuota(tmp_path / "none", PATTERN, max_mb=1.0).bytes == 0


@pytest.mark.parametrize("max_mb", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_limit(tmp_path: Path, max_mb: float) -> None:
    with pytest.raises(UsageError, match="a number of MB above 0"):
        DiskQuota(tmp_path, PATTERN, max_mb)
