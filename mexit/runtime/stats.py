"""Statistics of a runtime: exits, MACs and latency percentiles, in constant memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from math import log10

import numpy as np

_BUCKETS_PER_DECADE = 40
_LOWEST_MS, _DECADES = 1e-3, 9
_LAST_BUCKET = _BUCKETS_PER_DECADE * _DECADES


@dataclass(frozen=True)
class StatsSnapshot:
    """The statistics at one moment.

    Attributes:
        predictions: number of answers.
        exits: number of answers at each exit, (E,).
        macs: MACs spent on them.
        saved_macs: MACs that the static network would have cost on top; negative if it would have cost less.
        rate_limited: answers at an earlier exit because the rate limiter had no tokens for the next segment.
        watch_macs: MACs of the drift check, which come on top of `macs`.
        latency_ms: 50th, 95th and 99th percentile, within 6 %; None before the first answer.
        unsure: answers that the reject option withheld; they count at their exit and in `macs` like all others.
    """

    predictions: int
    exits: tuple[int, ...]
    macs: int
    saved_macs: int
    rate_limited: int
    watch_macs: int
    latency_ms: dict[str, float] | None
    unsure: int = 0

    @property
    def mean_macs(self) -> float:
        """MACs per answer."""
        return self.macs / self.predictions if self.predictions else 0.0

    @property
    def saved(self) -> float:
        """Share of the cost of the static network that was not spent, at most 1; negative if more was spent."""
        static = self.macs + self.saved_macs
        return self.saved_macs / static if static else 0.0


class RuntimeStats:
    """Running totals of a runtime. Thread-safe."""

    def __init__(self, exits: int, static_macs: int) -> None:
        """All totals start at zero.

        Args:
            exits: number of exits, E.
            static_macs: MACs of the static network.
        """
        self._static_macs, self._macs = static_macs, 0
        self._exits = [0] * exits
        self._latencies = [0] * (_LAST_BUCKET + 1)
        self._rate_limited = self._unsure = 0
        self._watch_macs = 0
        self._lock = threading.Lock()

    def add(self, k: int, latency_ms: float, macs: int, rate_limited: bool = False, unsure: bool = False) -> None:
        """Count an answer.

        Args:
            k: its exit in the bundle, from 1.
            latency_ms: milliseconds until the answer.
            macs: what it cost.
            rate_limited: whether it ended early for want of tokens.
            unsure: whether it is unsure.
        """
        decades = log10(max(latency_ms, _LOWEST_MS) / _LOWEST_MS)
        bucket = min(int(_BUCKETS_PER_DECADE * decades), _LAST_BUCKET)
        with self._lock:
            self._exits[k - 1] += 1
            self._latencies[bucket] += 1
            self._rate_limited += rate_limited
            self._unsure += unsure
            self._macs += macs

    def add_watched(self, macs: int) -> None:
        """Count MACs that the drift check spent."""
        with self._lock:
            self._watch_macs += macs

    def snapshot(self) -> StatsSnapshot:
        """A consistent copy."""
        with self._lock:
            exits, latencies = tuple(self._exits), self._latencies.copy()
            rate_limited, watch_macs, macs, unsure = self._rate_limited, self._watch_macs, self._macs, self._unsure
        predictions = sum(exits)
        percentiles = {f"p{q}": _quantile_ms(latencies, q / 100) for q in (50, 95, 99)} if predictions else None
        saved = predictions * self._static_macs - macs
        return StatsSnapshot(predictions, exits, macs, saved, rate_limited, watch_macs, percentiles, unsure)


def _quantile_ms(counts: Sequence[int], share: float) -> float:
    """The upper edge of the bucket that holds the quantile, milliseconds."""
    bucket = int(np.searchsorted(np.cumsum(counts), share * sum(counts)))
    return float(_LOWEST_MS * 10 ** ((bucket + 1) / _BUCKETS_PER_DECADE))
