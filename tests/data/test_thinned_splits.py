"""`Splits.thinned` removes training images only, and the same fraction of every class."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from mexit.data import digits
from mexit.data.dataset import DataSet
from mexit.data.splits import NAMES, Splits, split
from mexit.errors import UsageError


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
