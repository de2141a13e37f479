"""Splitting arrays into batches, and thinning them evenly."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)


def split_batches(array: NDArray[Scalar], size: int) -> list[NDArray[Scalar]]:
    """Consecutive parts of at most `size` entries along the first axis; an empty array is one empty part."""
    return np.array_split(array, range(size, len(array), size))


def evenly_spaced(array: NDArray[Scalar], most: int | None) -> NDArray[Scalar]:
    """At most `most` entries along the first axis, evenly spaced and in order; None = all."""
    if most is None or most >= len(array):
        return array
    return array[np.linspace(0, len(array) - 1, most).astype(np.int64)]
