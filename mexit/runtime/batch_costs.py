"""What a batch costs on this machine: seconds of each segment, decision included, at every batch size.

Measured once when a server starts, in well under a second, at a few sizes; the others are interpolated. It tells
how large a batch has to be to be efficient, and whether one more group of rows should join it. On one CPU
thread an engine is nearly linear in the batch, and what merging saves is the fixed cost of a run.

Outside every account and bound, as the rehearsals of a budget in milliseconds are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mexit.core.scores import Scorer
from mexit.runtime.backends.base import Backend
from mexit.runtime.request import BATCH

SIZES = (1, 2, 4, 8, 16, 32, BATCH)
LIMIT_S = 0.4
_REPEATS = 10  # others on the machine only ever make a run longer: the shortest counts
_EFFICIENT = 1.1  # a batch is large enough once a row costs at most this times what it costs at the best size


@dataclass(frozen=True)
class BatchCosts:
    """Seconds of a batch.

    Attributes:
        seconds: of segment k at B rows is `seconds[k - 1][B]`, for B in 0..`BATCH`.
    """

    seconds: tuple[tuple[float, ...], ...]

    def of(self, k: int, rows: int) -> float:
        """Of segment `k` (from 1) on at most `BATCH` rows."""
        return self.seconds[k - 1][rows]

    @cached_property
    def efficient_rows(self) -> int:
        """The smallest size at which a row through the whole network costs about as little as it can."""
        whole = np.sum(self.seconds, axis=0)[1:]
        each = whole / np.arange(1, BATCH + 1)
        return int(np.argmax(each <= _EFFICIENT * each.min())) + 1


def table(sizes: Sequence[int], seconds: Sequence[Sequence[float]]) -> BatchCosts:
    """From times at some sizes, (S,) and (S, E): between sizes on a line, beyond the last one in proportion.

    A larger batch never counts as cheaper than a smaller one, whatever was measured.
    """
    rows = np.arange(BATCH + 1)
    found = []
    for times in np.asarray(seconds, np.float64).T:
        between = np.interp(rows, (0, *sizes), (0.0, *np.maximum.accumulate(times)))
        beyond = between[sizes[-1]] * rows / sizes[-1]
        found.append(tuple(np.where(rows <= sizes[-1], between, beyond).tolist()))
    return BatchCosts(tuple(found))


def measure(backend: Backend, scorer: Scorer, shape: Sequence[int], limit_s: float = LIMIT_S) -> BatchCosts:
    """Time every segment on grey images.

    Args:
        backend: the loaded segments.
        scorer: whose decisions are timed with them.
        shape: of one image, (C, H, W).
        limit_s: no larger size is begun that would end after so many seconds.
    """
    begun_s = time.perf_counter()
    sizes: list[int] = []
    seconds: list[list[float]] = []
    _pass(backend, scorer, np.full((1, *shape), 0.5, np.float32))  # what engines do once is not timed
    for size in SIZES:
        images = np.full((size, *shape), 0.5, np.float32)
        last_s = _REPEATS * sum(seconds[-1]) if seconds else 0.0
        if time.perf_counter() - begun_s + 2 * last_s > limit_s and seconds:
            break
        repeats = [_pass(backend, scorer, images) for _ in range(_REPEATS)]
        sizes.append(size)
        seconds.append(np.min(repeats, axis=0).tolist())
    return table(sizes, seconds)


def _pass(backend: Backend, scorer: Scorer, images: NDArray[np.float32]) -> list[float]:
    """Seconds of each segment in one pass through the network, (E,)."""
    carried, state = backend.carry(images), scorer.start(len(images))
    seconds = []
    for k, segment in enumerate(backend.segments, start=1):
        begun_s = time.perf_counter()
        carried, logits = segment.run(carried)
        state, _, _ = scorer.step(k, logits, state)
        seconds.append(time.perf_counter() - begun_s)
    return seconds
