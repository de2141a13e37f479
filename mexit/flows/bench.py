"""`mexit bench`: measure the latency of a bundle on this machine, per path and batch size.

The path `full` runs every segment, `exit 1` stops at the first exit, and each calibrated budget leaves as its policy
decides on the bundle's own calibration images, or on random images where the data set is missing. The paths
alternate, so that background load affects all of them.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
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
from mexit.errors import MexitError, UsageError
from mexit.runtime import autotune
from mexit.runtime.runtime import Runtime

BATCHES = (1, 8, 64)
REPEATS = 200
MIN_REPEATS = 20
WARM_UP = 5
IMAGES, RANDOM_IMAGES = 512, 64


@dataclass(frozen=True)
class Row:
    """Latency of one path at one batch size.

    Attributes:
        engine: name of the engine.
        threads: threads of the engine.
        batch: images per call.
        path: "full", "exit 1" or the name of a budget.
        p50_us: median latency of a call in microseconds. For single images, this is the latency of one exit.
        p95_us: 95th percentile in microseconds.
        mean_us: mean in microseconds, which is what early exit lowers.
        n: number of timed calls.
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
    """The latencies of a bundle.

    Attributes:
        rows: one row per path and batch size.
        machine: processor, number of cores and system.
        images: description of the images.
        tuning: comparison of the engines; None unless it was requested.
    """

    rows: tuple[Row, ...]
    machine: dict[str, Any]
    images: str
    tuning: autotune.Explanation | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the object of `mexit bench --json`."""
        fields = {"rows": [asdict(row) for row in self.rows], "machine": self.machine, "images": self.images}
        return {**fields, "tuning": self.tuning.to_json()} if self.tuning else fields

    def slower_than_full(self) -> list[tuple[str, int]]:
        """Return path and batch size of the rows with a larger mean than `full`, which runs no early heads."""
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
    """Measure the latency of a bundle.

    Args:
        bundle: a bundle directory; default the newest.
        backend: name of the engine, or "auto".
        threads: threads of the engine; default the fastest measured number, else 1.
        batches: batch sizes, at least 1.
        repeats: timed calls of each path and batch size, at least 20.
        data_dir: folder of the data sets; default `MEXIT_DATA`.
        tune: measure every engine of this device first, and store the result for "auto".
        progress: receives the progress.

    Raises:
        UsageError: `repeats` or a batch size is too small.
        MexitError: the bundle or the engine cannot be opened.
    """
    progress = progress or Silent()
    if repeats < MIN_REPEATS or min(batches) < 1:
        raise UsageError(f"at least {MIN_REPEATS} repeats and batches of 1, found {repeats} and {list(batches)}")
    path = bundle or newest(BUNDLES, progress)
    tuning = autotune.tune(Bundle.open(path)) if tune else None
    runtime = Runtime.open(path, "full", backend=backend, threads=threads)
    images, description = _images(runtime, data_dir)
    rows: list[Row] = []
    with progress.track("timing", len(batches) * (WARM_UP + repeats)) as advance:
        for batch in batches:
            times_us: dict[str, list[float]] = {}
            for repeat in range(WARM_UP + repeats):
                index = np.arange(repeat * batch, (repeat + 1) * batch) % len(images)
                for name, latency_us in _time_paths(runtime, images[index]).items():
                    times_us.setdefault(name, []).append(latency_us)
                advance(1, f"batch {batch}")
            rows += [_row(runtime, batch, name, times[WARM_UP:]) for name, times in times_us.items()]
    return BenchResult(tuple(rows), machine(), description, tuning)


def machine() -> dict[str, Any]:
    """Return processor, number of cores and system, for result pages."""
    return {"cpu": processor_name(), "cores": read_limits().processors, "system": platform.platform()}


def _time_paths(runtime: Runtime, images: NDArray[np.float32]) -> dict[str, float]:
    """Return the latency of one call of each path, in microseconds."""
    paths: dict[str, tuple[str, int | None]] = {"full": ("full", None), "exit 1": ("full", 1)}
    if runtime.calibrated:
        paths.update({name: (name, None) for name in NAMED_FRACTIONS if name != "full"})
    times_us = {}
    for path, (budget, max_exit) in paths.items():
        start = time.perf_counter()
        runtime.answer_tensor(images, budget=budget, max_exit=max_exit)
        times_us[path] = (time.perf_counter() - start) * 1e6
    return times_us


def _row(runtime: Runtime, batch: int, path: str, times_us: Sequence[float]) -> Row:
    p50, p95 = np.quantile(times_us, [0.5, 0.95])
    mean = np.mean(times_us)
    return Row(runtime.backend.engine, runtime.threads, batch, path, float(p50), float(p95), float(mean), len(times_us))


def _images(runtime: Runtime, data_dir: str | Path | None) -> tuple[NDArray[np.float32], str]:
    """Return images (B, C, H, W) in [0, 1] and their description: calibration images, else random ones."""
    spec = runtime.bundle.manifest.input
    try:
        data, splits = registry.load_bundle_data(runtime.bundle, data_dir)
        index = splits.part("calibration")[:IMAGES]
        return data.batch(index, spec), f"{len(index)} calibration images of {data.name}"
    except MexitError:  # the data set is missing or has changed
        images = np.random.default_rng(0).random((RANDOM_IMAGES, *spec.shape), np.float32)
        return images, "random images, which leave at other exits than real ones"
