"""How long leaving at each exit takes on this device, one image at a time: what a budget in milliseconds rests on.

Facts of a device never go into a bundle. They are kept in `$MEXIT_CACHE/<model id>/<device>/` (default
`~/.cache/mexit`), readable by their owner alone, and measured again where they are missing or damaged.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mexit.core.atomic_io import read_json, sha256_bytes, to_json, write_bytes
from mexit.core.bundle import Bundle
from mexit.core.policies import FrontierPoint
from mexit.errors import BudgetInfeasible, MexitError, UsageError
from mexit.runtime.backends.base import Backend
from mexit.runtime.resource_limits import read_limits

Rehearse = Callable[[int], object]

ROUNDS = 200
WARM_UP = 20
# A rehearsal repeats one image, a stream does not (benchmarks/milliseconds.py).
MARGIN = 1.06


def device_times(bundle: Bundle, backend: Backend, threads: int, rehearse: Rehearse) -> tuple[float, ...]:
    """Mean milliseconds of an image that leaves at each exit, (E,), from the cache or measured now.

    Args:
        bundle, backend: name the model and the engine.
        threads: of the engine; other numbers have other times.
        rehearse: answers one image that leaves at the given exit (from 1), all that a real answer takes included.
    """
    path = cache_folder(bundle.id) / f"times-{backend.engine}-{backend.precision}-{threads}.json"
    try:
        stored = read_json(path, "times")["mean_ms"]
        if len(stored) == len(backend.segments) and all(value > 0 for value in stored):
            return tuple(float(value) for value in stored)
    except (MexitError, KeyError, TypeError):
        pass
    found = measure(rehearse, len(backend.segments))
    with suppress(MexitError):  # a device that cannot keep them measures them at every start
        keep_fact(path, {"mean_ms": list(found), "rounds": ROUNDS})
    return found


def measure(rehearse: Rehearse, exits: int) -> tuple[float, ...]:
    """Mean milliseconds of leaving at each exit, (E,), with `MARGIN`; exits take turns: noise meets all alike."""
    times = np.zeros((ROUNDS + WARM_UP, exits))
    for row in times:
        for place in range(exits):
            begin = time.perf_counter()
            rehearse(place + 1)
            row[place] = (time.perf_counter() - begin) * 1e3
    means = MARGIN * times[WARM_UP:].mean(axis=0)
    return tuple(float(value) for value in np.maximum.accumulate(means))


def expected_ms(point: FrontierPoint, times_ms: Sequence[float]) -> float:
    """Mean time of a frontier point on data like the calibration data."""
    return float(np.dot(point.calibration.exits, times_ms) / point.calibration.n)


def place_within(frontier: Sequence[FrontierPoint], limit_ms: float, times_ms: Sequence[float]) -> int:
    """The place of the most expensive point whose expected time is within the limit. Raises `BudgetInfeasible`."""
    within = [place for place, point in enumerate(frontier) if expected_ms(point, times_ms) <= limit_ms]
    if not within:
        least = expected_ms(frontier[0], times_ms)
        raise BudgetInfeasible(
            f"a budget of {limit_ms:g} ms: the cheapest calibrated policy takes {least:.3g} ms in the mean here; "
            f"the nearest feasible budget is {least * 1.05:.3g}ms"
        )
    return within[-1]


def cache_root() -> Path:
    """`$MEXIT_CACHE`, else `~/.cache/mexit`. Raises `UsageError` where there is no home directory either."""
    given = os.environ.get("MEXIT_CACHE")
    try:
        return Path(given) if given else Path.home() / ".cache" / "mexit"
    except RuntimeError:
        raise UsageError(
            "this user has no home directory to keep facts of this device in: set MEXIT_CACHE to a folder"
        ) from None


def cache_folder(model: str) -> Path:
    """Where facts of this device about a model are kept. Raises `UsageError`, see `cache_root`."""
    device = f"{platform.machine()} {processor()} {read_limits().threads}"
    return cache_root() / model[:32] / sha256_bytes(device.encode())[:16]


def make_private(folder: Path) -> None:
    """Make `cache_root` or a folder in it, all that was missing for its owner's eyes alone. Raises `OSError`."""
    root = cache_root()
    root.parent.mkdir(parents=True, exist_ok=True)
    below = [root / part for part in folder.relative_to(root).parents][::-1]
    for missing in (*below, folder):
        missing.mkdir(exist_ok=True, mode=0o700)  # its mode is that of the last folder alone with `parents`


def keep_fact(path: Path, value: Any) -> None:
    """Store a fact of this device atomically, readable by its owner alone.

    Raises:
        MexitError: the folder cannot be written.
    """
    try:
        make_private(path.parent)
    except OSError as error:
        raise MexitError(
            f"{path.parent} cannot be made ({error.strerror}): set MEXIT_CACHE to a folder that can be written"
        ) from None
    write_bytes(path, to_json(value))


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
