"""The cost of leaving at an exit, in MACs.

One MAC is one multiply-add; the "MFLOPs" of papers on these networks are 10^6 MACs. The cost of exit k is the cost of
everything that ran: the trunk up to exit k and the heads on the way. A head that the policy does not need does not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Costs:
    """MACs of leaving at each exit.

    Attributes:
        cumulative: if every head on the way runs, (E,).
        heads: of the head of each exit alone, (E,); empty if the engine cannot leave heads out.
    """

    cumulative: tuple[int, ...]
    heads: tuple[int, ...] = ()

    def under(self, active_heads: Sequence[bool]) -> tuple[int, ...]:
        """MACs of leaving at each exit, (E,), if only some heads of exits 1..E-1 run, (E-1,) or longer."""
        if not self.heads:
            return self.cumulative
        left_out = [0 if active else macs for active, macs in zip(active_heads, self.heads, strict=False)]
        saved = np.concatenate([[0], np.cumsum(left_out)]).astype(np.int64).tolist()
        return tuple(cost - saved[k] for k, cost in enumerate(self.cumulative))


def exit_counts(exits: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Number of samples that left at each of `count` exits, (E,), from their exits (N,), counted from 1."""
    return np.bincount(exits - 1, minlength=count).astype(np.int64)


def mean_macs(exits: NDArray[np.int64], cumulative_macs: Sequence[int]) -> float:
    """Mean cost of samples that left at `exits`, (N,), MACs; 0.0 without samples."""
    if not len(exits):
        return 0.0
    return float(np.asarray(cumulative_macs, np.float64)[exits - 1].mean())
