"""The cost of leaving at an exit, and of the static network, in MACs or in microseconds.

One MAC is one multiply-add; the "MFLOPs" of papers on these networks are 10^6 MACs. The cost of exit k is the cost of
everything that ran: the trunk up to exit k and the heads of exits 1..k. The static network is the trunk with the last
head alone. It is the reference of every saving, and thresholds of only None mean it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MACS, MICROSECONDS = "macs", "us"
# A share of the static network's cost. Savings below it are within the error of a measured time.
SMALLEST_SAVING = {MACS: 0.0, MICROSECONDS: 0.02}


@dataclass(frozen=True)
class Costs:
    """The cost of leaving at each exit.

    Attributes:
        cumulative: of the segments up to each exit, (E,), not decreasing.
        static: of the static network.
        unit: "macs" or "us" (microseconds of a single image).
    """

    cumulative: tuple[float, ...]
    static: float
    unit: str = MACS

    @property
    def first(self) -> float:
        """The cost of the cheapest policy: exit 1 alone, or the static network where exit 1 is not cheaper."""
        return self.cumulative[0] if self.cumulative[0] < self.most_expensive else self.static

    @property
    def most_expensive(self) -> float:
        """Policies with thresholds must cost less than this: the static network does the same without them."""
        return self.static * (1 - SMALLEST_SAVING[self.unit])

    def of_exits(self, thresholds: Sequence[float | None]) -> tuple[float, ...]:
        """The cost of leaving at each exit under thresholds (E-1,), (E,); without any, the last one is the static's."""
        if any(threshold is not None for threshold in thresholds):
            return self.cumulative
        return (*self.cumulative[:-1], self.static)


def exit_counts(exits: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Number of samples that left at each of `count` exits, (E,), from their exits (N,), counted from 1."""
    return np.bincount(exits - 1, minlength=count).astype(np.int64)


def mean_macs(exits: NDArray[np.int64], exit_macs: Sequence[float]) -> float:
    """Mean cost of samples that left at `exits`, (N,), MACs; 0.0 without samples."""
    if not len(exits):
        return 0.0
    return float(np.asarray(exit_macs, np.float64)[exits - 1].mean())
