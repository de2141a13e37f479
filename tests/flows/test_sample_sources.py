"""Images stored in a bundle are checked before calibration uses them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mexit.core.manifest import InputSpec, PrepareSpec
from mexit.core.progress import Silent
from mexit.data.calibration_images import CalibrationImages
from mexit.data.dataset import ArrayImages, DataSet
from mexit.data.groups import Grouping
from mexit.data.splits import split
from mexit.errors import Damaged
from mexit.flows.sample_sources import MAX_TEST, Attack, BundleSource, DatasetSource, gather

SPEC = InputSpec("input", "float32", "NCHW", 1, (2, 2), (0.0, 1.0), PrepareSpec())
IMAGES = CalibrationImages(
    "calibration", "clean", "5" * 64, np.zeros((3, 1, 2, 2), np.float32), np.arange(3), np.arange(3)
)


def test_a_bundle_without_the_clean_images_of_a_split_is_damaged() -> None:
    source = BundleSource({IMAGES.file: IMAGES}, IMAGES.data_sha256)
    assert source.clean("calibration").n == 3
    assert source.attacked("calibration") is None
    with pytest.raises(Damaged, match="no clean ones of the split 'certification'"):
        source.clean("certification")


def test_stored_images_keep_their_content() -> None:
    copy = CalibrationImages.from_bytes(IMAGES.to_bytes(), "x.npz", SPEC, classes=3)
    assert (copy.split, copy.condition, copy.data_sha256) == ("calibration", "clean", "5" * 64)
    np.testing.assert_array_equal(copy.images, IMAGES.images)
    np.testing.assert_array_equal(copy.index, IMAGES.index)


def test_groups_reach_the_samples_of_a_split() -> None:
    groups = np.array([4, 4, 9])
    copy = CalibrationImages.from_bytes(replace(IMAGES, groups=groups).to_bytes(), "x.npz", SPEC, classes=3)
    assert BundleSource({IMAGES.file: copy}, "5").clean("calibration").groups.tolist() == [4, 4, 9]
    images = ArrayImages(np.zeros((400, 2, 2), np.uint8))
    data = DataSet("films", ("a", "b"), images, np.arange(400) // 200, "0" * 64, None)
    grouping = Grouping(np.arange(400) // 8, "films of 8 frames")
    source = DatasetSource(data, split(data, grouping), SPEC, Attack("shift", lambda images, _labels, _index: images))
    for samples in (source.clean("certification"), source.attacked("certification"), source.test().samples):
        index = np.concatenate([rows for _, _, rows in samples.batches])
        assert samples.groups.tolist() == (index // 8).tolist()
    for images in gather(source, Silent()):
        assert images.groups.tolist() == (images.index // 8).tolist()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"condition": 5}, "expected str, found 5"),
        ({"labels": np.array([0, 1, 3])}, "labels are 0 to 3, expected 0 to 2"),
        ({"index": np.arange(2)}, r"indices \(2,\)"),
        ({"groups": np.arange(2)}, r"3 images, groups \(2,\)"),
        ({"images": np.full((3, 1, 2, 2), 2, np.float32)}, "values from 2 to 2"),
    ],
    ids=["condition is a number", "label out of range", "index too short", "groups too short", "pixels out of range"],
)
def test_damaged_images_are_named(fields: dict, words: str) -> None:
    with pytest.raises(Damaged, match=f"calibration images x.npz are not readable: .*{words}"):
        CalibrationImages.from_bytes(replace(IMAGES, **fields).to_bytes(), "x.npz", SPEC, classes=3)


@pytest.mark.parametrize(("count", "taken"), [(4 * MAX_TEST + 400, MAX_TEST), (400, 100)])
def test_a_large_test_split_is_thinned_evenly(count: int, taken: int) -> None:
    images = ArrayImages(np.zeros((count, 2, 2), np.uint8))
    data = DataSet("many", ("a", "b"), images, np.arange(count) % 2, "0" * 64, None)
    parts = split(data)
    test = DatasetSource(data, parts, SPEC).test()
    assert test.samples is not None
    assert (test.samples.n, test.of, test.missing) == (taken, count // 4, "")
    index = np.concatenate([rows for _, _, rows in test.samples.batches])
    assert len(index) == taken
    assert set(index.tolist()) <= set(parts.part("test").tolist())
    assert np.ptp(np.diff(np.searchsorted(parts.part("test"), index))) <= 1
