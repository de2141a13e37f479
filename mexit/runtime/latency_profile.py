"""The latency profile: mean milliseconds of one image that leaves at each exit, measured on this device.

Budgets in milliseconds rest on it. It is stored in the device cache, and measured again if it is missing or damaged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from mexit.core.atomic_io import read_json
from mexit.core.bundle import Bundle
from mexit.core.policies_file import FrontierPoint
from mexit.errors import BudgetInfeasible, MexitError
from mexit.runtime.backends.base import Backend
from mexit.runtime.device_cache import cache_folder, write_fact

RunToExit = Callable[[int], object]
"""Answers one image that leaves at the given exit (from 1), with everything that a real answer takes."""

ROUNDS = 200
WARM_UP = 20
# The measurement repeats one image; a stream of different images is slower (benchmarks/milliseconds.py).
MARGIN = 1.06


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
