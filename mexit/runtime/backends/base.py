"""The interface of an engine: a `Backend` with one `Segment` per exit, and the static network.

To add an engine, write one file in this package with a class that has the members of `Backend`, and register it in
`registry.py`. Its segments need one method, `run`. Carried features on the host are a `HostCarried`; an engine with
other memory brings its own `Carried` class and keeps the features there.

An engine is faster if it has `runners` and `static_runners`: a single image then runs through buffers that are bound
once (`bound_runner`).
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


class Backend(Protocol):
    """An engine with every segment of one bundle loaded.

    Attributes:
        engine, precision, variant: the key of its entry in `policies.json`.
    """

    engine: str
    precision: str
    variant: str

    @property
    def segments(self) -> Sequence[Segment]:
        """One segment per exit."""

    @property
    def static(self) -> Segment | None:
        """The static network, opened at the first use; None if the bundle has none. It carries no features."""

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
