"""The seam: a segment takes carried features and gives the next ones and the logits of its exit.

On the host, carried features are a tuple of arrays; an engine that keeps them elsewhere brings its own
`Carried` and leaves them there. Only logits have to come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Carried(Protocol):
    """Features of B rows between two segments."""

    @property
    def rows(self) -> int:
        """B."""

    @property
    def nbytes(self) -> int:
        """Size of the features."""

    def take(self, rows: NDArray[np.intp]) -> Carried:
        """The given rows, in the given order."""

    def concat(self, others: Sequence[Any]) -> Carried:
        """These rows, then those of `others` of the same kind."""


class Segment(Protocol):
    """One segment of an opened bundle."""

    def run(self, carried: Any) -> tuple[Carried, NDArray[np.float32]]:
        """Carried features of B rows to the next carried features and logits (B, C) float32 on the host."""

    def features(self, carried: Any) -> Carried:
        """The next carried features alone: the exit's head does not run where `Backend.drops_heads`."""


class Backend(Protocol):
    """An engine with every segment of one bundle loaded.

    Attributes:
        engine, precision, variant: the key of its entry in `policies.json`.
        drops_heads: whether `Segment.features` spares the head.
    """

    engine: str
    precision: str
    variant: str
    drops_heads: bool

    @property
    def segments(self) -> Sequence[Segment]:
        """One for each exit."""

    def carry(self, images: NDArray[np.float32]) -> Carried:
        """Images (B, C, H, W) float32 in [0, 1] as the carried features of segment 1."""


class HostCarried:
    """Carried features as a tuple of arrays, each (B, ...)."""

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
        everyone = (self, *others)
        return HostCarried(
            [np.concatenate(parts) for parts in zip(*(one.arrays for one in everyone), strict=True)]
        )
