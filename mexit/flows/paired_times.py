"""Times several ways to answer the same images, in turns, and compares their mean times in pairs.

The ways alternate every few calls on the same images, in a new random order, so that other work on the machine slows
all of them alike. One round gives one ratio of mean times; the interval is Student's t over the logarithms of the
rounds' ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import exp

import numpy as np
from numpy.typing import NDArray

from mexit.calibrate.clusters import t_quantile
from mexit.errors import UsageError

ROUNDS = 10
MIN_ROUNDS = 2
TURN = 20  # calls of one way before the next way runs: caches hold its weights, as they do in use
CONFIDENCE = 0.95

Call = Callable[[NDArray[np.float32]], object]
"""Answers one batch of images, (B, C, H, W) float32."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of two mean times.

    Attributes:
        value: geometric mean over the rounds.
        low, high: two-sided 95 % confidence interval.
    """

    value: float
    low: float
    high: float


def time_in_turns(
    ways: Mapping[str, Call],
    images: NDArray[np.float32],
    batch: int,
    calls: int,
    rounds: int = ROUNDS,
    on_turn: Callable[[int], object] = lambda _: None,
) -> dict[str, NDArray[np.float64]]:
    """Time each way on the same batches.

    Args:
        ways: name to call.
        images: (N, C, H, W) float32; batches are taken from them in order, again and again.
        batch: images per call, at least 1.
        calls: calls of each way in each round, at least 1.
        rounds: at least `MIN_ROUNDS`.
        on_turn: called after each turn with the number of timed calls, of all ways together.

    Returns:
        Microseconds of each call, (rounds, calls), by name.

    Raises:
        UsageError: a number is too small.
    """
    if batch < 1 or calls < 1 or rounds < MIN_ROUNDS:
        raise UsageError(
            f"a comparison needs batches and calls of at least 1 and {MIN_ROUNDS} rounds, found {batch}, {calls} and "
            f"{rounds}"
        )
    rng, parts = np.random.default_rng(0), _batches(images, batch)
    for call in ways.values():
        for _ in range(min(TURN, calls)):
            call(next(parts))
    names = list(ways)
    times_us = {name: np.zeros((rounds, calls)) for name in names}
    for row in range(rounds):
        for first in range(0, calls, TURN):
            turn = [next(parts) for _ in range(min(TURN, calls - first))]
            for i in rng.permutation(len(names)):
                call, target = ways[names[i]], times_us[names[i]][row]
                for column, part in enumerate(turn, start=first):
                    start = time.perf_counter()
                    call(part)
                    target[column] = (time.perf_counter() - start) * 1e6
            on_turn(len(turn) * len(names))
    return times_us


def time_ratio(times_us: NDArray[np.float64], reference_us: NDArray[np.float64]) -> Ratio:
    """The mean time of one way as a share of another one's.

    Args:
        times_us, reference_us: of the same rounds, (rounds, calls).
    """
    logs = np.log(times_us.mean(axis=1) / reference_us.mean(axis=1))
    middle = float(logs.mean())
    half = t_quantile((1 + CONFIDENCE) / 2, len(logs) - 1) * float(logs.std(ddof=1)) / len(logs) ** 0.5
    return Ratio(exp(middle), exp(middle - half), exp(middle + half))


def _batches(images: NDArray[np.float32], batch: int) -> Iterator[NDArray[np.float32]]:
    """Batches of the images, without end; views where the images suffice."""
    if len(images) < batch:
        images = np.resize(images, (batch, *images.shape[1:]))
    while True:
        for first in range(0, len(images) - batch + 1, batch):
            yield images[first : first + batch]
