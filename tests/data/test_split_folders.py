"""Split folders by their usual names in any case; what looks like splits and is not understood is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sample_images import encode, noise

from mexit.data import folder
from mexit.data.split_folders import find_split_folders
from mexit.errors import BadInput


def fill(root: Path, *folders: str, count: int = 2) -> Path:
    """Make `count` pictures in each folder below `root`."""
    for number, name in enumerate(folders):
        (root / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            (root / name / f"{k}.png").write_bytes(encode(noise(5, 5, seed=10 * number + k)))
    return root


def nested(*parts: str) -> tuple[str, ...]:
    return tuple(f"{part}/{name}" for part in parts for name in ("cat", "dog"))


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING", "training"])
@pytest.mark.parametrize("test", ["test", "Testing", "val", "VALID", "Validation"])
def test_usual_names_in_any_case(train: str, test: str, tmp_path: Path) -> None:
    data = folder.load(fill(tmp_path, *nested(train, test)))
    assert data.classes == ("cat", "dog")
    assert data.official_test is not None
    assert data.official_test.tolist() == [4, 5, 6, 7]
    assert data.official_val is None


def test_test_is_the_official_test_part_and_val_the_validation_part(tmp_path: Path) -> None:
    data = folder.load(fill(tmp_path, *nested("train", "Valid", "test")))
    assert len(data) == 12
    assert data.official_val is not None
    assert data.official_test is not None
    assert data.official_val.tolist() == [4, 5, 6, 7]
    assert data.official_test.tolist() == [8, 9, 10, 11]
    assert data.labels.tolist() == [0, 0, 1, 1] * 3


def test_train_alone_has_no_test_part(tmp_path: Path) -> None:
    assert folder.load(fill(tmp_path, *nested("Train"))).official_test is None


@pytest.mark.parametrize(
    "classes",
    [("bus", "car", "train"), ("train station", "test tube"), ("fold_mountain", "plain"),
     ("cat", "dog"), ("cat/2023", "cat/2024", "dog/2023", "dog/2024"), ("training shoe", "boot")],
    ids=str,
)  # fmt: skip
def test_classes_with_similar_names_are_classes(classes: tuple[str, ...], tmp_path: Path) -> None:
    fill(tmp_path, *classes)
    assert find_split_folders(tmp_path) is None
    assert folder.load(tmp_path).classes == tuple(sorted({name.partition("/")[0] for name in classes}))


REFUSED = {
    "two folders of one split": (nested("train", "val", "validation"), "val and validation are the same split"),
    "training beside train": (nested("train", "Training"), "are the same split"),
    "no train": (nested("val", "test"), "there is no folder train beside test and val"),
    "test beside classes": (("cat", "dog", "test"), "there is no folder train beside test"),
    "no class folders": (("train", "test"), "there are no class folders in test and train"),
    "test without class folders": ((*nested("train"), "test"), "there are no class folders in test"),
    "train alone without class folders": (("train",), "there are no class folders in train"),
    "prefixes": (nested("seg_train", "seg_test"), "seg_test and seg_train have names of splits"),
    "suffixes": (nested("train_images", "Validation_Images"), "have names of splits"),
    "years": (nested("train2017", "val2017"), "train2017 and val2017 have names of splits"),
    "pairs of domains": (("trainA", "testA", "trainB", "testB"), "have names of splits"),
    "folds": (nested("fold1", "fold2", "fold3"), "fold1 and fold2 and fold3 have names of splits"),
    "another test": (nested("train", "test", "test2"), "test2 may be a split too"),
    "train beside classes": (("train/film1", "train/film2", "bus", "car"), "train has subfolders, and beside it"),
}


@pytest.mark.parametrize(("folders", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_understood_is_listed(folders: tuple[str, ...], words: str, tmp_path: Path) -> None:
    fill(tmp_path, *folders)
    with pytest.raises(BadInput, match=rf"{tmp_path} looks like a set with splits, .*{re.escape(words)}") as refused:
        folder.load(tmp_path)
    for name in {name.partition("/")[0] for name in folders}:
        assert f"{name} with " in str(refused.value)


def test_pictures_of_no_split_are_counted(tmp_path: Path) -> None:
    data = folder.load(fill(tmp_path, *nested("train", "test"), "unlabelled", "more/x"))
    assert len(data) == 8
    assert data.skipped == {
        "image in the folder unlabelled, which is no split": 2,
        "image in the folder more, which is no split": 2,
    }


def test_the_folder_inside_the_only_folder_is_named(tmp_path: Path) -> None:
    fill(tmp_path, "PetImages/cat", "PetImages/dog")
    with pytest.raises(BadInput, match=rf"1 class folder\(s\).*or name the folder inside: folder:{tmp_path}/PetImages"):
        folder.load(tmp_path)
