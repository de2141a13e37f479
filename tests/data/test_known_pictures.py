"""Pictures are known by their content: moved and renamed ones keep their split, edited ones are new."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sample_images import encode, noise

from mexit.data import digits, folder
from mexit.data.groups import Grouping
from mexit.data.known_pictures import UNKNOWN, fingerprints, groups_that_trained, keep_known, known_splits
from mexit.data.splits import NAMES, Splits, split
from mexit.errors import BadInput, Damaged


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for label, name in enumerate("ab"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for k in range(40):
            (tmp_path / "own" / name / f"{k:02}.png").write_bytes(encode(noise(12, 12, seed=100 * label + k)))
    return tmp_path / "own"


def stored_splits(root: Path) -> Splits:
    data = folder.load(root)
    return replace(split(data), fingerprints=fingerprints(data.images))  # type: ignore[arg-type]


def part_of(splits: Splits, count: int) -> np.ndarray:
    """Number of the split of each picture; -1 = none."""
    numbers = np.full(count, -1)
    for number, name in enumerate(NAMES):
        numbers[splits.part(name)] = number
    return numbers


def test_moved_and_renamed_pictures_keep_their_split_and_edited_ones_do_not(root: Path) -> None:
    stored, before = stored_splits(root), folder.load(root)
    first = dict(zip(before.images.names, part_of(stored, 80), strict=True))
    (root / "a" / "07.png").rename(root / "b" / "moved.png")
    (root / "a" / "08.png").write_bytes(encode(noise(12, 12, seed=999)))
    (root / "a" / "09.png").unlink()
    data = folder.load(root)
    known = known_splits(data.images, stored)
    assert known is not None
    found = dict(zip(data.images.names, known.tolist(), strict=True))
    assert found.pop("b/moved.png") == first["a/07.png"]
    assert found.pop("a/08.png") == UNKNOWN
    assert found == {name: first[name] for name in found}
    kept, sentence = keep_known(data, split(data), stored)
    after = part_of(kept, len(data))
    names = data.images.names
    assert all(after[names.index(name)] == part for name, part in found.items())
    assert sentence.startswith("78 of the 79 pictures of folder:")
    assert "trained the network and neither calibrate nor test it" in sentence


def test_copies_of_a_training_picture_count_as_trained(root: Path) -> None:
    stored = stored_splits(root)
    data = folder.load(root)
    trained = data.images.names[stored.part("train")[0]]
    for place in stored.part("calibration")[:2]:
        shutil.copy(root / trained, root / data.images.names[place])
    changed = folder.load(root)
    known = known_splits(changed.images, stored)
    assert known is not None
    assert (known[stored.part("calibration")[:2]] == NAMES.index("train")).all()
    kept, _ = keep_known(changed, split(changed), stored)
    assert not np.isin(stored.part("calibration")[:2], kept.part("calibration")).any()


def test_new_pictures_of_a_group_that_trained_do_not_calibrate(root: Path) -> None:
    stored = stored_splits(root)
    trained = stored.part("train")[:5]
    for k in range(5):
        (root / "b" / f"new{k}.png").write_bytes(encode(noise(12, 12, seed=500 + k)))
    data = folder.load(root)
    new = [data.images.names.index(f"b/new{k}.png") for k in range(5)]
    ids = np.arange(len(data), dtype=np.int64)
    ids[new] = ids[trained]
    known = known_splits(data.images, stored)
    assert known is not None
    assert set(ids[new]) <= set(groups_that_trained(known, ids).tolist())
    kept, sentence = keep_known(data, split(data, Grouping(ids, "pairs")), stored)
    assert set(new) <= set(kept.part("train").tolist())
    assert f"{len(stored.part('train')) + len(stored.part('selection')) + 5} of these" in sentence


def test_trained_pictures_in_a_test_folder_do_not_test(root: Path, tmp_path: Path) -> None:
    stored, before = stored_splits(root), folder.load(root)
    for i, name in enumerate(before.images.names):
        path = tmp_path / "parted" / ("test" if i % 4 == 0 else "train") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, path)
    data = folder.load(tmp_path / "parted")
    kept, _ = keep_known(data, split(data), stored)
    known = known_splits(data.images, stored)
    assert known is not None
    assert data.official_test is not None
    assert set(kept.part("test")) >= {i for i in data.official_test if known[i] > NAMES.index("selection")}
    assert not np.isin(np.flatnonzero(known <= NAMES.index("selection")), kept.part("test")).any()


def test_only_trained_pictures_are_refused(root: Path, tmp_path: Path) -> None:
    stored, data = stored_splits(root), folder.load(root)
    for i in stored.part("train"):
        path = tmp_path / "trained" / data.images.names[i]
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / data.images.names[i], path)
    copied = folder.load(tmp_path / "trained")
    parts = dict(zip(NAMES, np.array_split(np.arange(len(copied)), len(NAMES)), strict=True))
    with pytest.raises(BadInput, match="leaves none for calibration and certification: add pictures that did not"):
        keep_known(copied, Splits(copied.name, copied.sha256, parts), stored)


def test_other_pictures_and_splits_without_fingerprints_change_nothing(root: Path, tmp_path: Path) -> None:
    stored = stored_splits(root)
    for name in "ab":
        (tmp_path / "other" / name).mkdir(parents=True)
        for k in range(40):
            path = tmp_path / "other" / name / f"{k:02}.png"
            path.write_bytes(encode(noise(12, 12, seed=1000 + 2 * k + (name == "b"))))
    other = folder.load(tmp_path / "other")
    fresh = split(other)
    assert keep_known(other, fresh, stored) == (fresh, "")
    assert known_splits(folder.load(root).images, replace(stored, fingerprints=None)) is None
    assert known_splits(digits.load().images, stored) is None


def test_fingerprints_are_stored_and_checked(root: Path, tmp_path: Path) -> None:
    stored = stored_splits(root)
    (tmp_path / "splits.npz").write_bytes(stored.to_bytes())
    again = Splits.load(tmp_path / "splits.npz")
    assert stored.fingerprints is not None
    np.testing.assert_array_equal(again.fingerprints, stored.fingerprints)
    short = replace(stored, fingerprints=stored.fingerprints[:-1])
    with pytest.raises(Damaged, match=r"these splits have 79 fingerprints, folder:.* has 80 images"):
        short.check(folder.load(root))
    with pytest.raises(BadInput, match=r"fingerprints must be uint64 \(N,\), found float64"):
        replace(stored, fingerprints=np.zeros(80))  # type: ignore[arg-type]


def test_a_file_that_cannot_be_read_is_not_known(root: Path) -> None:
    stored = stored_splits(root)
    data = folder.load(root)
    (root / data.images.names[3]).unlink()
    known = known_splits(data.images, stored)
    assert known is not None
    assert known[3] == UNKNOWN
