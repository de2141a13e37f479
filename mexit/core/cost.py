"""What leaving at an exit costs.

One multiply-add is one MAC; papers' "MFLOPs" for these networks are mega-MACs. The cost of exit k is
everything that ran: the trunk up to k and every head that was asked on the way, earlier ones included.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def exit_counts(exits: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """How many samples left at each of `count` exits: exits (N,) from 1, to (E,)."""
    return np.bincount(exits - 1, minlength=count).astype(np.int64)


def mean_macs(exits: NDArray[np.int64], cumulative_macs: Sequence[int]) -> float:
    """Mean cost in MACs of samples that left at `exits` (N,)."""
    if not len(exits):
        return 0.0
    return float(np.asarray(cumulative_macs, np.float64)[exits - 1].mean())
