"""What a runtime has spent: exits taken, MACs to the last one, latency quantiles. Constant memory."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BUCKETS_PER_DECADE = 40
_LOWEST_MS, _DECADES = 1e-3, 9


@dataclass(frozen=True)
class StatsSnapshot:
    """The ledger at one moment.

    Attributes:
        predictions: how many answers.
        exits: how many left at each exit, (E,).
        macs: spent in all.
        saved_macs: what running the full network on every input would have cost more.
        rate_limited: how many answered early because the rate limiter had no tokens for the next segment.
        watch_macs: spent on top, on inputs that the drift watch ran to the last exit.
        latency_ms: 50th, 95th and 99th percentile, within 6 %; None before the first answer.
    """

    predictions: int
    exits: tuple[int, ...]
    macs: int
    saved_macs: int
    rate_limited: int
    watch_macs: int
    latency_ms: dict[str, float] | None

    @property
    def mean_macs(self) -> float:
        """MACs per answer."""
        return self.macs / self.predictions if self.predictions else 0.0

    @property
    def saved(self) -> float:
        """Share of the full cost that was not spent."""
        full = self.macs + self.saved_macs
        return self.saved_macs / full if full else 0.0


class RuntimeStats:
    """Adds up answers; safe to share between threads."""

    def __init__(self, exits: int, full_macs: int) -> None:
        """`full_macs` is what the full network costs, every head included."""
        self._full, self._spent = full_macs, 0
        self._exits = np.zeros(exits, np.int64)
        self._latencies = np.zeros(_BUCKETS_PER_DECADE * _DECADES + 1, np.int64)
        self._rate_limited = 0
        self._watched = 0
        self._lock = threading.Lock()

    def add(
        self, exits: NDArray[np.int64], latency_ms: NDArray[np.float64], macs: int, rate_limited: int = 0
    ) -> None:
        """Answers at `exits` (B,), from 1, after `latency_ms` (B,), `rate_limited` of them for want of tokens.

        `macs` is what they cost together.
        """
        places = np.log10(np.maximum(latency_ms, _LOWEST_MS) / _LOWEST_MS) * _BUCKETS_PER_DECADE
        buckets = np.minimum(places.astype(np.int64), len(self._latencies) - 1)
        with self._lock:
            np.add.at(self._exits, exits - 1, 1)
            np.add.at(self._latencies, buckets, 1)
            self._rate_limited += rate_limited
            self._spent += macs

    def add_watched(self, rows: int) -> None:
        """Inputs that the drift watch ran through the whole network once more."""
        with self._lock:
            self._watched += rows

    def snapshot(self) -> StatsSnapshot:
        """A consistent copy."""
        with self._lock:
            exits, latencies = self._exits.copy(), self._latencies.copy()
            rate_limited, watched, spent = self._rate_limited, self._watched, self._spent
        predictions = int(exits.sum())
        quantiles = {f"p{q}": _quantile(latencies, q / 100) for q in (50, 95, 99)} if predictions else None
        counts = tuple(int(count) for count in exits)
        saved = predictions * self._full - spent
        return StatsSnapshot(predictions, counts, spent, saved, rate_limited, watched * self._full, quantiles)


def _quantile(buckets: NDArray[np.int64], share: float) -> float:
    """The upper edge of the bucket that holds the quantile."""
    place = int(np.searchsorted(np.cumsum(buckets), share * buckets.sum()))
    return float(_LOWEST_MS * 10 ** ((place + 1) / _BUCKETS_PER_DECADE))
