"""Seconds of a batch in each segment, measured for continuous batching."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mexit.core.scores import Scorer
from mexit.runtime.backends.base import Backend
from mexit.runtime.request import MAX_BATCH

SIZES = (1, 2, 4, 8, 16, 32, MAX_BATCH)  # batch sizes that are timed; others are interpolated
SLOW_S = 0.02  # batches larger than one that takes this long are not timed
EFFICIENT = 1.1  # a batch is large enough if a row costs at most this times its cost at the best size


@dataclass(frozen=True)
class BatchLatencyTable:
    """Seconds of a batch in each segment, with its decision.

    Attributes:
        seconds: of segment k with B rows: `seconds[k - 1][B]`, (E, MAX_BATCH + 1).
    """

    seconds: tuple[tuple[float, ...], ...]

    @staticmethod
    def from_times(sizes: Sequence[int], times_s: Sequence[Sequence[float]]) -> BatchLatencyTable:
        """Interpolate times (S, E) that were measured at sizes (S,), ascending; beyond them a row costs the same."""
        times = np.maximum.accumulate(times_s)  # a larger batch never counts as faster
        beyond = 2 * MAX_BATCH
        known, rows = (0, *sizes, beyond), range(MAX_BATCH + 1)
        columns = np.vstack([np.zeros_like(times[:1]), times, times[-1:] * beyond / sizes[-1]]).T
        return BatchLatencyTable(tuple(tuple(np.interp(rows, known, column).tolist()) for column in columns))

    @staticmethod
    def measure(backend: Backend, scorer: Scorer, shape: Sequence[int]) -> BatchLatencyTable:
        """Time every segment on grey images of shape (C, H, W), scores included; the fastest of ten runs counts."""
        times_s: list[list[float]] = []
        for size in SIZES:
            images = np.full((size, *shape), 0.5, np.float32)
            runs = [_time_segments(backend, scorer, images) for _ in range(10)]
            times_s.append(np.min(runs, axis=0).tolist())
            if sum(times_s[-1]) > SLOW_S:
                break
        return BatchLatencyTable.from_times(SIZES[: len(times_s)], times_s)

    def segment_s(self, k: int, rows: int) -> float:
        """Seconds of segment k, from 1."""
        return self.seconds[k - 1][rows]

    def remaining_s(self, k: int, rows: int) -> float:
        """Seconds from segment k to the last exit, if no row leaves on the way."""
        return sum([seconds[rows] for seconds in self.seconds[k - 1 :]])

    @cached_property
    def efficient_rows(self) -> int:
        """The smallest batch in which a row costs at most `EFFICIENT` times its cost in the best batch."""
        per_row = np.sum(self.seconds, axis=0)[1:] / np.arange(1, len(self.seconds[0]))
        return int(np.argmax(per_row <= EFFICIENT * per_row.min())) + 1


def _time_segments(backend: Backend, scorer: Scorer, images: NDArray[np.float32]) -> list[float]:
    """Seconds of each segment in one pass through the network, (E,)."""
    carried, state = backend.carry(images), scorer.start(len(images))
    seconds = []
    for k, segment in enumerate(backend.segments, start=1):
        start_s = time.perf_counter()
        carried, logits = segment.run(carried)
        state, _, _ = scorer.step(k, logits, state)
        seconds.append(time.perf_counter() - start_s)
    return seconds
