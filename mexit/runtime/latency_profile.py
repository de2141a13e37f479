"""The latency profile: the time of one image that leaves at each exit, and of the static network, on this device.

Thresholds that are selected in time rest on it, and so do budgets in milliseconds where thresholds are in MACs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from mexit.core.cost import MICROSECONDS, Costs
from mexit.core.policies_file import FrontierPoint
from mexit.errors import BudgetInfeasible, Damaged

TimedCalls = Sequence[Callable[[], object]]
"""A call for each exit, which answers one image there, then one for the static network."""

WARM_UP = 20
PROFILE_SECONDS = 1.2
MIN_PROFILE_ROUNDS, MAX_PROFILE_ROUNDS = 30, 2000
STEP = 0.01  # of the static network's time: smaller differences are noise, and should select the same thresholds


@dataclass(frozen=True)
class Profile:
    """Times of a single image in one engine on one device.

    Attributes:
        exits_us: microseconds of leaving at each exit, end to end through the runtime, (E,).
        static_us: microseconds of the static network.
        model: id of the bundle.
        engine, precision, threads: the engine and its number of threads.
        versions: installed versions of the packages that the times depend on.
    """

    exits_us: tuple[float, ...]
    static_us: float
    model: str
    engine: str
    precision: str
    threads: int
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        if not self.exits_us or not all(isfinite(us) and us > 0 for us in (*self.exits_us, self.static_us)):
            raise Damaged(f"times must be positive numbers, found {self.exits_us} and {self.static_us} us")

    @property
    def costs(self) -> Costs:
        """The times as costs in microseconds, rounded to `STEP` of the static network's time; not decreasing."""
        step = STEP * self.static_us
        shares = np.maximum.accumulate(np.maximum(np.rint(np.array(self.exits_us) / step), 1.0))
        return Costs(tuple(float(share * step) for share in shares), self.static_us, MICROSECONDS)


def measure_times_us(calls: TimedCalls) -> tuple[tuple[float, ...], float]:
    """Median microseconds of each call, and of the last one (the static network); about `PROFILE_SECONDS` seconds.

    Each round makes every call once, in an order that changes, so that other work on the machine slows all alike. The
    medians of other work's pauses do not count.
    """
    rng = np.random.default_rng(0)
    for call in calls:
        for _ in range(WARM_UP):
            call()
    rounds: list[NDArray[np.float64]] = []
    start = time.perf_counter()
    while len(rounds) < MAX_PROFILE_ROUNDS:
        if len(rounds) >= MIN_PROFILE_ROUNDS and time.perf_counter() - start > PROFILE_SECONDS:
            break
        times_us = np.zeros(len(calls))
        for i in rng.permutation(len(calls)):
            before = time.perf_counter()
            calls[i]()
            times_us[i] = (time.perf_counter() - before) * 1e6
        rounds.append(times_us)
    *exits_us, static_us = np.median(np.array(rounds), axis=0).tolist()
    return tuple(exits_us), static_us


def expected_us(point: FrontierPoint, times: Costs) -> float:
    """Mean microseconds of a frontier point on data like the calibration data.

    Args:
        point: thresholds and the exits taken on the calibration data.
        times: of leaving at each exit, and of the static network, in microseconds.
    """
    return float(np.dot(point.calibration.exits, times.of_exits(point.thresholds)) / point.calibration.n)


def index_within(frontier: Sequence[FrontierPoint], limit_ms: float, times: Costs) -> int:
    """Index of the most expensive frontier point whose expected time is within a limit.

    Args:
        frontier: points in the order of their cost.
        limit_ms: the limit, milliseconds.
        times: of leaving at each exit, and of the static network, in microseconds.

    Raises:
        BudgetInfeasible: no point is within the limit.
    """
    expected_ms = [expected_us(point, times) / 1e3 for point in frontier]
    within = [index for index, ms in enumerate(expected_ms) if ms <= limit_ms]
    if not within:
        least = min(expected_ms)
        raise BudgetInfeasible(
            f"a budget of {limit_ms:g} ms: the cheapest calibrated policy takes {least:.3g} ms in the mean here; "
            f"the nearest feasible budget is {least * 1.05:.3g}ms"
        )
    return within[-1]
