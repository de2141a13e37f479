"""The latency profile: the time of one image that leaves at each exit, and of the static network, on this device.

Thresholds that are selected in time rest on a `Profile`. With thresholds in MACs, budgets in milliseconds rest on the
mean times of the exits, which the device cache keeps too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from mexit.core.atomic_io import read_json
from mexit.core.bundle import Bundle
from mexit.core.cost import MICROSECONDS, Costs
from mexit.core.policies_file import FrontierPoint
from mexit.errors import BudgetInfeasible, Damaged, MexitError
from mexit.runtime.backends.base import Backend
from mexit.runtime.device_cache import cache_folder, write_fact

TimedCalls = Sequence[Callable[[], object]]
"""A call for each exit, which answers one image there, then one for the static network."""
RunToExit = Callable[[int], object]
"""Answers one image that leaves at the given exit (from 1), with everything that a real answer takes."""

ROUNDS = 200
WARM_UP = 20
# The measurement repeats one image; a stream of different images is slower (benchmarks/milliseconds.py).
MARGIN = 1.06
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
            raise Damaged(f"a latency profile needs positive times, found {self.exits_us} and {self.static_us}")

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


def exit_times_ms(bundle: Bundle, backend: Backend, threads: int, run_to_exit: RunToExit) -> tuple[float, ...]:
    """The latency profile from the device cache, or measured now.

    Args:
        bundle, backend: the model and the engine.
        threads: number of threads of the engine; each number has its own profile.
        run_to_exit: see `RunToExit`.

    Returns:
        Mean milliseconds of leaving at each exit, (E,).
    """
    path = cache_folder(bundle.id) / f"times-{backend.engine}-{backend.precision}-{threads}.json"
    try:
        stored = read_json(path, "times")["mean_ms"]
        if len(stored) == len(backend.segments) and all(value > 0 for value in stored):
            return tuple(float(value) for value in stored)
    except (MexitError, KeyError, TypeError):
        pass
    times_ms = time_exits(run_to_exit, len(backend.segments))
    with suppress(MexitError):  # without a writable cache the profile is measured at every start
        write_fact(path, {"mean_ms": list(times_ms), "rounds": ROUNDS})
    return times_ms


def time_exits(run_to_exit: RunToExit, exits: int) -> tuple[float, ...]:
    """Mean milliseconds of leaving at each exit, (E,), times `MARGIN`; increasing.

    Each round times every exit once, so that noise affects all exits alike.
    """
    times_ms = np.array([[time_exit(run_to_exit, k) for k in range(1, exits + 1)] for _ in range(WARM_UP + ROUNDS)])
    means = MARGIN * times_ms[WARM_UP:].mean(axis=0)
    return tuple(float(value) for value in np.maximum.accumulate(means))


def time_exit(run_to_exit: RunToExit, k: int) -> float:
    """Milliseconds of one run to exit k (from 1)."""
    start = time.perf_counter()
    run_to_exit(k)
    return (time.perf_counter() - start) * 1e3


def expected_ms(point: FrontierPoint, times_ms: Sequence[float]) -> float:
    """Mean milliseconds of a frontier point on data like the calibration data, from the times of the exits, (E,)."""
    return float(np.dot(point.calibration.exits, times_ms) / point.calibration.n)


def index_within(frontier: Sequence[FrontierPoint], limit_ms: float, times_ms: Sequence[float]) -> int:
    """Index of the most expensive frontier point whose expected time is within a limit.

    Args:
        frontier: points in the order of their cost.
        limit_ms: the limit, milliseconds.
        times_ms: mean milliseconds of leaving at each exit, (E,).

    Raises:
        BudgetInfeasible: no point is within the limit.
    """
    within = [index for index, point in enumerate(frontier) if expected_ms(point, times_ms) <= limit_ms]
    if not within:
        least = expected_ms(frontier[0], times_ms)
        raise BudgetInfeasible(
            f"a budget of {limit_ms:g} ms: the cheapest calibrated policy takes {least:.3g} ms in the mean here; "
            f"the nearest feasible budget is {least * 1.05:.3g}ms"
        )
    return within[-1]
