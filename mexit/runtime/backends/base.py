"""The interface of an engine: a `Backend` with one `Segment` per exit.

To add an engine, write one file in this package with a class that has the members of `Backend`, and register it in
`registry.py`. Its segments need one method, `run`. Carried features on the host are a `HostCarried`; an engine with
other memory brings its own `Carried` class and keeps the features there.

Two optional parts make an engine faster. With `drops_heads` its segments can run without their head (`features`).
With `runners` a single image runs through buffers that are bound once (`bound_runner`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Carried(Protocol):
    """The features of B rows between two segments."""

    @property
    def rows(self) -> int:
        """The number of rows, B."""

    @property
    def nbytes(self) -> int:
        """Size of the features, bytes."""

    def take(self, rows: NDArray[np.intp]) -> Carried:
        """The given rows, in the given order."""

    def concat(self, others: Sequence[Any]) -> Carried:
        """These rows, then the rows of `others`, which are of the same class."""


class Segment(Protocol):
    """One segment of an opened bundle."""

    def run(self, carried: Any) -> tuple[Carried, NDArray[np.float32]]:
        """Run the segment on the carried features of B rows.

        Returns:
            The next carried features, and logits (B, C) float32 on the host.
        """

    def features(self, carried: Any) -> Carried:
        """The next carried features alone; the head does not run if `Backend.drops_heads`."""
        return self.run(carried)[0]


class Backend(Protocol):
    """An engine with every segment of one bundle loaded.

    Attributes:
        engine, precision, variant: the key of its entry in `policies.json`.
        drops_heads: whether `Segment.features` saves the cost of the head.
    """

    engine: str
    precision: str
    variant: str
    drops_heads: bool

    @property
    def segments(self) -> Sequence[Segment]:
        """One segment per exit."""

    def carry(self, images: NDArray[np.float32]) -> Carried:
        """Images (B, C, H, W) float32 in [0, 1] as the carried features of segment 1."""


class HostCarried:
    """Carried features as numpy arrays, each (B, ...)."""

    __slots__ = ("arrays",)

    def __init__(self, arrays: Sequence[NDArray[Any]]) -> None:
        self.arrays = tuple(arrays)

    @property
    def rows(self) -> int:
        return len(self.arrays[0]) if self.arrays else 0

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def take(self, rows: NDArray[np.intp]) -> HostCarried:
        return HostCarried([array.take(rows, axis=0) for array in self.arrays])

    def concat(self, others: Sequence[HostCarried]) -> HostCarried:
        parts = zip(*(carried.arrays for carried in (self, *others)), strict=True)
        return HostCarried([np.concatenate(arrays) for arrays in parts])
