"""Batches cover an array in order, and thinning is even."""

from __future__ import annotations

import numpy as np
import pytest

from mexit.data.dataset import evenly_spaced, split_batches


@pytest.mark.parametrize(("count", "sizes"), [(0, [0]), (1, [1]), (4, [4]), (5, [4, 1]), (8, [4, 4]), (9, [4, 4, 1])])
def test_batches_cover_the_array_in_order(count: int, sizes: list[int]) -> None:
    parts = split_batches(np.arange(count), 4)
    assert [len(part) for part in parts] == sizes
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(count))


def test_evenly_spaced_entries_include_both_ends_and_never_repeat() -> None:
    assert evenly_spaced(np.arange(10), 4).tolist() == [0, 3, 6, 9]
    assert evenly_spaced(np.arange(3), 5).tolist() == evenly_spaced(np.arange(3), None).tolist() == [0, 1, 2]
    assert len(set(evenly_spaced(np.arange(1000), 999).tolist())) == 999
