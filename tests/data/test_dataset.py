"""Batches cover an array in order, thinning is even, and classes can take another order."""

from __future__ import annotations

import numpy as np
import pytest

from mexit.data import digits
from mexit.data.dataset import DataSet, evenly_spaced, split_batches
from mexit.errors import UsageError


@pytest.mark.parametrize(("count", "sizes"), [(0, [0]), (1, [1]), (4, [4]), (5, [4, 1]), (8, [4, 4]), (9, [4, 4, 1])])
def test_batches_cover_the_array_in_order(count: int, sizes: list[int]) -> None:
    parts = split_batches(np.arange(count), 4)
    assert [len(part) for part in parts] == sizes
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(count))


def test_evenly_spaced_entries_include_both_ends_and_never_repeat() -> None:
    assert evenly_spaced(np.arange(10), 4).tolist() == [0, 3, 6, 9]
    assert evenly_spaced(np.arange(3), 5).tolist() == evenly_spaced(np.arange(3), None).tolist() == [0, 1, 2]
    assert len(set(evenly_spaced(np.arange(1000), 999).tolist())) == 999


def pets(*classes: str) -> DataSet:
    labels = np.asarray([0, 1, 2, 1], np.int64)
    return DataSet("pets", classes, digits.load().images, labels, "0", None)


def test_classes_take_the_order_of_a_bundle() -> None:
    data = pets("a", "b", "c")
    moved = data.with_classes(("c", "a", "b"), "bundle")
    assert moved.classes == ("c", "a", "b")
    assert [moved.classes[label] for label in moved.labels] == [data.classes[label] for label in data.labels]
    assert data.with_classes(("a", "b", "c"), "bundle") is data


@pytest.mark.parametrize("classes", [("a", "b"), ("a", "b", "c", "d"), ("a", "b", "B"), tuple("abcdefgh")])
def test_other_classes_are_named(classes: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"pets has the classes 'a', 'b', 'c'; bundles/x has 'a', 'b'.*classes\.txt"):
        pets("a", "b", "c").with_classes(classes, "bundles/x")
