"""Cutting positions into batches and thinning them evenly."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)


def batches(array: NDArray[Scalar], size: int) -> list[NDArray[Scalar]]:
    """Consecutive parts of at most `size` entries along the first axis; an empty array is one empty part."""
    return np.array_split(array, range(size, len(array), size))


def evenly_spaced(count: int, most: int | None) -> NDArray[np.int64]:
    """At most `most` positions below `count`, evenly spaced and increasing; None = all."""
    if most is None or most >= count:
        return np.arange(count)
    return np.linspace(0, count - 1, most).astype(np.int64)
