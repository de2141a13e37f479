"""`mexit bench`: latency of a bundle on this machine, per path and batch.

Paths: `full` runs every segment, `exit 1` leaves everybody there, and each calibrated budget leaves as it would on
the bundle's own calibration images, if the data set is at hand, else on random images. Paths take turns, so that a
noisy machine is noisy for all of them.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.artifact_paths import BUNDLES, newest
from mexit.core.budget import NAMED_FRACTIONS
from mexit.core.bundle import Bundle
from mexit.core.progress import Progress, Silent
from mexit.core.resource_limits import processor_name, read_limits
from mexit.data import registry
from mexit.data.splits import Splits
from mexit.errors import MexitError, UsageError
from mexit.runtime import autotune
from mexit.runtime.runtime import Runtime

BATCHES = (1, 8, 64)
REPEATS = 200
MIN_REPEATS = 20


@dataclass(frozen=True)
class Row:
    """Latency of one path.

    Attributes:
        engine, threads, batch, path: what was timed.
        p50_us, p95_us, mean_us: microseconds a call (a whole batch). Early exit is about the mean: the median of
            single images is that of one exit.
        n: calls.
    """

    engine: str
    threads: int
    batch: int
    path: str
    p50_us: float
    p95_us: float
    mean_us: float
    n: int


@dataclass(frozen=True)
class BenchResult:
    """All rows, the machine they were measured on, and how its engines compare if that was asked for."""

    rows: tuple[Row, ...]
    machine: dict[str, Any]
    images: str
    tuning: autotune.Explanation | None = None

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        found = {"rows": [asdict(row) for row in self.rows], "machine": self.machine, "images": self.images}
        return {**found, "tuning": self.tuning.to_json()} if self.tuning else found

    def slower_than_full(self) -> list[tuple[str, int]]:
        """Budgets, and at which batch, that take longer than the whole network does without its early heads."""
        full = {row.batch: row.mean_us for row in self.rows if row.path == "full"}
        return [(row.path, row.batch) for row in self.rows if row.mean_us > full[row.batch]]


def bench_bundle(
    bundle: Path | None = None,
    *,
    backend: str = "auto",
    threads: int | None = None,
    batches: Sequence[int] = BATCHES,
    repeats: int = REPEATS,
    data_dir: str | Path | None = None,
    tune: bool = False,
    progress: Progress | None = None,
) -> BenchResult:
    """Time a bundle. See the module for the paths; `tune` compares the engines of this device first."""
    progress = progress or Silent()
    if repeats < MIN_REPEATS or min(batches) < 1:
        raise UsageError(f"at least {MIN_REPEATS} repeats and batches of 1, found {repeats} and {list(batches)}")
    path = bundle or newest(BUNDLES, progress)
    tuning = None
    if tune:
        tuning = autotune.tune(Bundle.open(path))
        choice = tuning.choice
        progress.note(f"on this device {choice.backend} with {choice.threads} thread(s) serves {path}")
    runtime = Runtime.open(path, "full", backend=backend, threads=threads)
    images, said = _images(runtime, data_dir)
    rows = []
    with progress.track("timing", len(batches) * repeats) as advance:
        for batch in batches:
            paths = _paths(runtime)
            times: dict[str, list[float]] = {name: [] for name in paths}
            for repeat in range(repeats + MIN_REPEATS // 4):
                start = repeat * batch % len(images)
                part = np.take(images, range(start, start + batch), axis=0, mode="wrap")
                for name, call in paths.items():
                    begin = time.perf_counter()
                    call(part)
                    times[name].append((time.perf_counter() - begin) * 1e6)
                advance(1 if repeat < repeats else 0, f"batch {batch}")
            rows += [_row(runtime, batch, name, values) for name, values in times.items()]
    return BenchResult(tuple(rows), machine(), said, tuning)


def machine() -> dict[str, Any]:
    """What a result page must say of the hardware."""
    return {"cpu": processor_name(), "cores": read_limits().processors, "system": platform.platform()}


def _paths(runtime: Runtime) -> dict[str, Callable[[NDArray[np.float32]], Any]]:
    paths: dict[str, Callable[[NDArray[np.float32]], Any]] = {
        "full": lambda part: runtime.answer_tensor(part, budget="full"),
        "exit 1": lambda part: runtime.answer_tensor(part, budget="full", max_exit=1),
    }
    if runtime.calibrated:
        for name in NAMED_FRACTIONS:
            if name != "full":
                paths[name] = lambda part, name=name: runtime.answer_tensor(part, budget=name)  # type: ignore[misc]
    return paths


def _row(runtime: Runtime, batch: int, path: str, values: list[float]) -> Row:
    counted = np.asarray(values[MIN_REPEATS // 4 :])
    p50, p95 = np.quantile(counted, [0.5, 0.95])
    times = float(p50), float(p95), float(counted.mean())
    return Row(runtime.backend.engine, runtime.threads, batch, path, *times, len(counted))


def _images(runtime: Runtime, data_dir: str | Path | None) -> tuple[NDArray[np.float32], str]:
    """Calibration images, or random ones where the data set is not at hand, and which."""
    bundle = runtime.bundle
    stored = bundle.splits()
    try:
        if stored is not None and bundle.manifest.splits is not None:
            data = registry.load(bundle.manifest.splits.data_set, data_dir)
            splits = Splits.from_bytes(stored, bundle.path)
            splits.check(data)
            index = splits.part("calibration")[:512]
            return data.batch(index, bundle.manifest.input), f"{len(index)} calibration images of {data.name}"
    except MexitError:
        pass
    random = np.random.default_rng(0).random((64, *bundle.manifest.input.shape), np.float32)
    return random, "random images: exits are taken as such images take them"
