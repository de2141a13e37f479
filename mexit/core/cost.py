"""What leaving at an exit costs.

One multiply-add is one MAC; papers' "MFLOPs" for these networks are mega-MACs. The cost of exit k is
everything that ran: the trunk up to k and every head that was asked on the way, earlier ones included. Where
nobody may leave, the head need not be asked, and is not paid for.
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
        cumulative: with every head on the way, (E,).
        heads: what the head of each exit alone needs, (E,); empty where no head can be left out.
    """

    cumulative: tuple[int, ...]
    heads: tuple[int, ...] = ()

    def under(self, asked: Sequence[bool]) -> tuple[int, ...]:
        """The same, when only some heads of exits 1..E-1 are asked, (E-1,) or longer, to (E,)."""
        if not self.heads:
            return self.cumulative
        left_out = [0 if wanted else macs for wanted, macs in zip(asked, self.heads, strict=False)]
        spared = np.concatenate([[0], np.cumsum(left_out)]).astype(np.int64).tolist()
        return tuple(cost - spared[k] for k, cost in enumerate(self.cumulative))


def exit_counts(exits: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """How many samples left at each of `count` exits: exits (N,) from 1, to (E,)."""
    return np.bincount(exits - 1, minlength=count).astype(np.int64)


def mean_macs(exits: NDArray[np.int64], cumulative_macs: Sequence[int]) -> float:
    """Mean cost in MACs of samples that left at `exits` (N,)."""
    if not len(exits):
        return 0.0
    return float(np.asarray(cumulative_macs, np.float64)[exits - 1].mean())
