"""Splits are disjoint and stored without loss; thinned splits lose training images only; damaged files are refused."""

from __future__ import annotations

import dataclasses
import io
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mexit.core.atomic_io import sha256_bytes
from mexit.data import digits
from mexit.data.dataset import ArrayImages, DataSet
from mexit.data.groups import Grouping, shared_with_test
from mexit.data.splits import NAMES, Splits, few_calibrate, split
from mexit.errors import BadInput, Damaged, NotFound, UsageError


def data_set(n: int = 200, classes: int = 4, official_test: np.ndarray | None = None) -> DataSet:
    images = ArrayImages(np.zeros((n, 2, 2), np.uint8))
    labels = np.arange(n, dtype=np.int64) % classes
    return DataSet("x", tuple("abcdefghij"[:classes]), images, labels, "5" * 64, official_test)


def parts(**changes: object) -> dict[str, np.ndarray]:
    default = {name: np.arange(10 * i, 10 * i + 10, dtype=np.int64) for i, name in enumerate(NAMES)}
    return {name: np.asarray(changes.get(name, part)) for name, part in default.items()}


def stored(about: object = None, **changes: object) -> bytes:
    value = {"data_set": "x", "data_sha256": "5" * 64} if about is None else about
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    np.savez_compressed(buffer, about=text, **parts(**changes))
    return buffer.getvalue()


@pytest.mark.parametrize("official", [None, np.arange(150, 200)], ids=["no test part", "official test part"])
def test_the_five_parts_are_disjoint_complete_and_hold_every_class(official: np.ndarray | None) -> None:
    data = data_set(official_test=official)
    splits = split(data)
    indices = np.concatenate([splits.part(name) for name in NAMES])
    assert sorted(indices.tolist()) == list(range(200))
    for name in NAMES:
        assert set(data.labels[splits.part(name)]) == {0, 1, 2, 3}, name
        assert (np.diff(splits.part(name)) > 0).all()
    if official is not None:
        assert splits.part("test").tolist() == official.tolist()


def test_the_splits_of_digits_never_change() -> None:
    data = digits.load()
    first, second = split(data), split(data)
    assert first.hashes() == second.hashes()
    assert {name: len(first.part(name)) for name in NAMES} == {
        "train": 943, "selection": 81, "calibration": 243, "certification": 81, "test": 449,
    }  # fmt: skip
    hashes = "".join(first.hashes().values())  # a change here would move test images into training
    assert sha256_bytes(hashes.encode())[:16] == "86a3edb50159f3c7"


def grouped(classes: int = 4, tracks: int = 20, frames: int = 5, official: int = 0) -> tuple[DataSet, Grouping]:
    """`tracks` groups of `frames` images in each class; the last `official` groups of a class are the test part."""
    track = np.repeat(np.arange(classes * tracks), frames)
    test = np.flatnonzero(track % tracks >= tracks - official) if official else None
    images = ArrayImages(np.zeros((len(track), 2, 2), np.uint8))
    data = DataSet("x", tuple("abcdefghij"[:classes]), images, track // tracks, "5" * 64, test)
    return data, Grouping(track.astype(np.int64), "tracks")


@pytest.mark.parametrize("official", [0, 6], ids=["no test part", "official test part"])
def test_a_group_lies_in_one_split_and_every_class_in_all_of_them(official: int) -> None:
    data, grouping = grouped(tracks=25, official=official)
    splits = split(data, grouping)
    indices = np.concatenate([splits.part(name) for name in NAMES])
    assert sorted(indices.tolist()) == list(range(500))
    groups = {name: set(grouping.ids[splits.part(name)].tolist()) for name in NAMES}
    assert sum(map(len, groups.values())) == len(set.union(*groups.values())) == 100
    for name in NAMES:
        assert set(data.labels[splits.part(name)]) == {0, 1, 2, 3}, name
    rest = 100 - len(groups["test"])
    assert len(groups["test"]) == (24 if official else 20)
    assert 0.12 <= len(groups["certification"]) / rest <= 0.17
    assert len(groups["train"]) > rest / 2
    assert splits.grouping == "tracks"
    assert (splits.groups_of(splits.part("test")) == grouping.ids[splits.part("test")]).all()


@pytest.mark.parametrize(
    ("tracks", "present"),
    [
        (2, ("train", "test")),
        (3, ("train", "test", "calibration")),
        (5, ("train", "test", "calibration", "certification")),
        (7, NAMES),
    ],
)
def test_a_class_with_few_groups_is_in_the_splits_that_need_it_most(tracks: int, present: tuple[str, ...]) -> None:
    data, grouping = grouped(classes=3, tracks=20)
    keep = np.flatnonzero((data.labels != 2) | (grouping.ids < 40 + tracks))
    data = dataclasses.replace(
        data, labels=data.labels[keep], images=ArrayImages(np.zeros((len(keep), 2, 2), np.uint8))
    )
    splits = split(data, Grouping(grouping.ids[keep], "tracks"))
    assert {name for name in NAMES if 2 in data.labels[splits.part(name)]} == set(present)


@pytest.mark.parametrize(("tracks", "official"), [(4, 0), (6, 0), (4, 1)])
def test_too_few_groups_for_five_splits_are_refused(tracks: int, official: int) -> None:
    data, grouping = grouped(classes=3, tracks=tracks, official=official)
    with pytest.raises(BadInput, match=r"too few for five splits \(.*would be empty\).*--group none"):
        split(data, grouping)
    assert len(split(data).part("certification"))


def test_seven_groups_for_each_class_are_enough() -> None:
    data, grouping = grouped(classes=3, tracks=7)
    assert all(len(split(data, grouping).part(name)) for name in NAMES)


def test_a_class_of_one_group_is_refused_with_the_number_of_groups() -> None:
    data, grouping = grouped(classes=3, tracks=20)
    ids = np.where(data.labels == 1, 20, grouping.ids)
    with pytest.raises(BadInput, match=r"the split 'test' .* no image of b: these classes have 1 group.*--group"):
        split(data, Grouping(ids, "tracks"))
    official = dataclasses.replace(data, official_test=np.flatnonzero(np.arange(300) % 50 == 0))
    ids[official.official_test] = 1000
    assert 1 in data.labels[split(official, Grouping(ids, "tracks")).part("train")]


def test_a_group_that_is_most_of_its_class_is_trained_on() -> None:
    data, grouping = grouped(classes=3, tracks=20)
    ids = np.where((data.labels == 1) & (grouping.ids < 35), 20, grouping.ids)
    for seed in range(10):
        splits = split(data, Grouping(ids, "tracks"), seed)
        assert 20 in ids[splits.part("train")], seed


def test_groups_of_several_classes_leave_no_class_out() -> None:
    """A film shows classes a and b, and b is in no other film."""
    data, grouping = grouped(classes=4, tracks=20)
    labels = np.where((data.labels == 0) & (np.arange(400) % 5 == 0) & (grouping.ids < 4), 1, data.labels)
    labels[(data.labels == 1)] = 0
    data = dataclasses.replace(data, labels=labels)
    for seed in range(5):
        splits = split(data, grouping, seed)
        assert all(1 in labels[splits.part(name)] for name in ("train", "test", "calibration")), seed


def test_groups_that_reach_into_the_test_part_are_left_out() -> None:
    data, grouping = grouped(official=4)
    inside = int(data.official_test[0])
    ids = grouping.ids.copy()
    ids[:5] = ids[inside]
    splits = split(data, Grouping(ids, "tracks"))
    assert not set(range(5)) & set(np.concatenate(list(splits.parts.values())).tolist())
    assert splits.grouping == "tracks; 5 training pictures of 1 groups in the test part are left out"
    assert shared_with_test(data, ids).tolist() == [0, 1, 2, 3, 4]


def test_a_test_part_that_divides_most_groups_is_kept_with_a_warning() -> None:
    data, grouping = grouped()
    data = dataclasses.replace(data, official_test=np.flatnonzero(np.arange(400) % 5 == 0))
    splits = split(data, grouping)
    assert sum(map(len, splits.parts.values())) == 400
    assert "warning: 320 training pictures belong to 80 groups that are in the test part too" in splits.grouping


def test_groups_of_one_image_divide_images_with_more_for_certification() -> None:
    data = data_set(official_test=np.arange(150, 200))
    own, plain = split(data, Grouping(np.arange(200), "no groups")), split(data)
    assert own.groups is None
    assert own.hashes()["test"] == plain.hashes()["test"]
    assert (len(own.part("certification")), len(plain.part("certification"))) == (21, 9)


@pytest.mark.parametrize(("n", "calibrate"), [(60, 15), (80, 20), (100, 20), (140, 20), (200, 21)])
def test_small_sets_give_calibration_what_thresholds_need(n: int, calibrate: int) -> None:
    """At most a third of the images outside the test part calibrate."""
    splits = split(data_set(n, classes=2), Grouping(np.arange(n), "no groups"))
    assert len(splits.part("calibration")) == calibrate
    assert len(splits.part("train")) >= 0.45 * 0.75 * n
    assert ("add images" in few_calibrate(splits)) == (calibrate < 20)


@pytest.mark.parametrize("with_groups", [False, True])
def test_a_seed_draws_other_splits(with_groups: bool) -> None:
    data, grouping = grouped()
    used = grouping if with_groups else None
    first, again, other = split(data, used), split(data, used, 0), split(data, used, 1)
    assert first.hashes() == again.hashes()
    assert all(first.hashes()[name] != other.hashes()[name] for name in NAMES)
    assert other.hashes() == split(data, used, 1).hashes()


def test_stored_groups_are_read_back(tmp_path: Path) -> None:
    data, grouping = grouped()
    (tmp_path / "splits.npz").write_bytes(split(data, grouping).to_bytes())
    splits = Splits.load(tmp_path / "splits.npz")
    assert (splits.groups == grouping.ids).all()
    assert splits.grouping == "tracks"
    assert (splits.thinned(data, 0.5, None).groups == grouping.ids).all()
    with pytest.raises(Damaged, match="these splits have 400 group ids, x has 200 images"):
        dataclasses.replace(splits, parts=parts()).check(data_set())


def test_another_number_of_group_ids_is_refused() -> None:
    with pytest.raises(BadInput, match="x has 200 images, found 400 group ids"):
        split(data_set(), grouped()[1])


def test_stored_splits_are_read_back(tmp_path: Path) -> None:
    before = split(data_set())
    (tmp_path / "splits.npz").write_bytes(before.to_bytes())
    after = Splits.load(tmp_path / "splits.npz")
    assert after.hashes() == before.hashes()
    after.check(data_set())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "are not readable"),
        (stored()[:-30], "are not readable"),
        (stored(train=[0, 0, 1]), "the five splits overlap"),
        (stored(train=[10]), "the five splits overlap"),
        (stored(train=[0.5]), r"must be lists of int64, found float64 \(1,\)"),
        (stored(train=[[0, 1]]), r"must be lists of int64, found int64 \(1, 2\)"),
        (stored(train=5), "must be lists of int64"),
        (stored(train=np.asarray([object()])), "allow_pickle=False"),
        (stored(about={"data_set": "x"}), "have no 'data_sha256'"),
        (stored(about=[1]), "expected an object"),
        (stored(about={"data_set": "x", "data_sha256": 5}), "expected str, found 5"),
    ],
    ids=["empty", "cut short", "duplicate", "overlap", "floats", "two axes", "a number", "pickle", "no hash",
         "list", "hash a number"],
)  # fmt: skip
def test_a_damaged_splits_file_is_named(content: bytes, words: str) -> None:
    with pytest.raises(Damaged, match=rf"splits runs/x/splits.npz .*{words}"):
        Splits.from_bytes(content, Path("runs/x/splits.npz"))


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    about = json.dumps({"data_set": "x", "data_sha256": "5" * 64}).encode()
    np.savez(buffer, about=np.frombuffer(about, np.uint8), train=np.arange(3))
    with pytest.raises(Damaged, match="have no 'selection'"):
        Splits.from_bytes(buffer.getvalue(), tmp_path)
    with pytest.raises(NotFound, match=r"splits .* does not exist"):
        Splits.load(tmp_path / "gone.npz")


@pytest.mark.parametrize("index", [-1, 200], ids=["negative", "past the end"])
def test_an_index_outside_the_data_set_is_refused(index: int) -> None:
    splits = Splits("x", "5" * 64, parts(train=np.asarray([index])))
    with pytest.raises(Damaged, match=r"these splits have the indices -?\d+ to \d+, x has 200 images"):
        splits.check(data_set())


def test_splits_of_other_data_are_refused() -> None:
    changed = dataclasses.replace(data_set(), sha256="6" * 64)
    with pytest.raises(
        Damaged, match=r"belong to x 555555555555, but the loaded data set is x 666666666666: it was changed"
    ):
        split(data_set()).check(changed)


def test_an_unknown_split_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown split 'val': choose from train, selection, calibration, certif"):
        split(data_set()).part("val")


@pytest.mark.parametrize("n", [4, 12], ids=["one of each class", "three of each class"])
def test_too_few_images_of_a_class_are_refused(n: int) -> None:
    with pytest.raises(BadInput, match=r"x: the split '\w+' \(\d images\) would have no image of \w.*: add images"):
        split(data_set(n))


def test_an_official_test_part_without_a_class_is_refused() -> None:
    with pytest.raises(BadInput, match=r"the split 'test' \(2 images\) would have no image of c, d: add images"):
        split(data_set(official_test=np.asarray([0, 1])))


@pytest.fixture(scope="module")
def data() -> DataSet:
    return digits.load()


@pytest.fixture(scope="module")
def whole(data) -> Splits:
    return split(data)


def per_class(data: DataSet, splits: Splits) -> np.ndarray:
    return np.bincount(data.labels[splits.part("train")], minlength=10)


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.95])
def test_every_class_keeps_the_same_fraction(data, whole, fraction) -> None:
    thin = whole.thinned(data, fraction, None)
    train = thin.part("train")
    assert len(train) == round(fraction * len(whole.part("train")))
    assert np.abs(per_class(data, thin) - fraction * per_class(data, whole)).max() <= 1
    assert set(train) <= set(whole.part("train"))
    assert (np.diff(train) > 0).all()


def test_a_smaller_fraction_is_a_subset_of_a_larger_one(data, whole) -> None:
    """A curve over fractions then adds images and replaces none."""
    parts = [set(whole.thinned(data, fraction, None).part("train")) for fraction in (0.05, 0.2, 0.5, 1.0)]
    assert all(small < large for small, large in pairwise(parts))


def test_an_omitted_class_is_removed_and_the_others_are_complete(data, whole) -> None:
    before, after = per_class(data, whole), per_class(data, whole.thinned(data, 1.0, "3"))
    assert after[3] == 0 < before[3]
    assert np.array_equal(np.delete(after, 3), np.delete(before, 3))


def test_a_fraction_of_the_remaining_classes(data, whole) -> None:
    thin, rest = whole.thinned(data, 0.5, "3"), whole.thinned(data, 1.0, "3")
    assert per_class(data, thin)[3] == 0
    assert np.abs(per_class(data, thin) - 0.5 * per_class(data, rest)).max() <= 1


def test_the_other_four_splits_are_unchanged(data, whole) -> None:
    thin = whole.thinned(data, 0.1, "7")
    assert thin.hashes()["train"] != whole.hashes()["train"]
    assert all(thin.hashes()[name] == whole.hashes()[name] for name in NAMES if name != "train")
    thin.check(data)


def test_a_fraction_of_1_changes_nothing(data, whole) -> None:
    assert whole.thinned(data, 1.0, None).hashes() == whole.hashes()


def test_an_unknown_class_is_refused_with_the_known_ones(data, whole) -> None:
    with pytest.raises(UsageError, match="no class 'ten' in digits: choose from 0, 1, 2"):
        whole.thinned(data, 1.0, "ten")


def test_an_empty_training_split_is_refused(data, whole) -> None:
    with pytest.raises(UsageError, match=r"--fraction 0\.0001 leaves no training image of digits"):
        whole.thinned(data, 0.0001, None)
