"""`mexit demo`: train with NEO-KD on the embedded digits, export, calibrate and evaluate."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.artifact_paths import BUNDLES, RUNS
from mexit.core.atomic_io import write_bytes
from mexit.core.budget import NAMED_FRACTIONS
from mexit.core.bundle import Bundle
from mexit.core.progress import Progress, Silent
from mexit.data import digits, splits
from mexit.errors import requires_extra
from mexit.flows.evaluate import evaluate_model
from mexit.flows.export import ExportOptions, export_bundle
from mexit.flows.train import TrainOptions, train_model
from mexit.runtime.runtime import Runtime

with requires_extra("train", "The demo"):
    from PIL import Image

NAME = "demo"
SAMPLES, SAMPLE_SCALE = 6, 8
TIMED = 200


@dataclass(frozen=True)
class DemoResult:
    """The result of the demo.

    Attributes:
        report: the object of `mexit demo --json`.
        latency_us: median latency of a single image in microseconds, by budget.
        picture: plot of accuracy against MACs; None without matplotlib.
        samples: image files of the test split, named after their label.
    """

    report: Mapping[str, Any]
    latency_us: Mapping[str, float]
    picture: Path | None
    samples: tuple[Path, ...]


def run_demo(*, threads: int | None = None, progress: Progress | None = None) -> DemoResult:
    """Train, export, calibrate, and evaluate on the test split. Replaces `runs/demo` and `bundles/demo`.

    Args:
        threads: threads for training; default all cores.
        progress: receives the progress.

    Raises:
        MissingExtra: a package of the extras `cpu` or `train` is not installed.
    """
    progress = progress or Silent()
    start_s = time.monotonic()
    run, bundle = RUNS / NAME, BUNDLES / NAME
    if (run / "settings.json").exists():
        shutil.rmtree(run)
    # fp32 gives the same figures on processors with and without bfloat16.
    train_model(
        data="digits",
        settings={"precision": "fp32"},
        out=run,
        options=TrainOptions(threads=threads),
        progress=progress,
    )
    export_bundle(run, out=bundle, replace=True, options=ExportOptions(exits="all"), progress=progress)
    evaluation = evaluate_model(bundle, samples=None, progress=progress)
    samples, latency_us = _write_samples(run / "samples"), _latencies(bundle)
    report = _report(evaluation.report, bundle, run, time.monotonic() - start_s)
    picture = next((path for path in evaluation.written if path.suffix == ".png"), None)
    return DemoResult(report, latency_us, picture, samples)


def _report(evaluation: Mapping[str, Any], bundle: Path, run: Path, seconds: float) -> dict[str, Any]:
    """Return the object of `mexit demo --json`; `attacked` is the average attack."""
    costs = Bundle.open(bundle).manifest.cumulative_macs
    exits = [
        {"exit": row["exit"], "macs": macs, "clean": row["clean"]["value"], "attacked": row["average"]["value"]}
        for row, macs in zip(evaluation["exits"], costs, strict=True)
    ]
    budgets = {
        name: {
            "budget_macs": row["budget_macs"],
            "mean_macs": row["clean"]["mean_macs"],
            "saved": row["clean"]["saved"],
            "accuracy": row["clean"]["value"],
            "attacked": row["average"]["value"],
            "exits": row["clean"]["exits"],
        }
        for name, row in evaluation["budgets"].items()
    }
    return {
        "exits": exits,
        "budgets": budgets,
        "same_policy": evaluation["settings"]["same_policy"],
        "n": evaluation["settings"]["n"],
        "attack": evaluation["settings"]["attack"],
        "run": str(run),
        "bundle": str(bundle),
        "seconds": round(seconds, 1),
    }


def _test_images() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return images (N, 8, 8) and labels (N,) of the test split."""
    data = digits.load()
    index = splits.split(data).part("test")
    return np.asarray(data.images.at(index), np.uint8), data.labels[index]


def _latencies(bundle: Path) -> dict[str, float]:
    """Return the median latency of a single image in microseconds, by budget. The budgets alternate."""
    runtime = Runtime.open(bundle)
    images = runtime.prepare(_test_images()[0][:TIMED, :, :, None].repeat(3, axis=3))
    times_us: dict[str, list[float]] = {name: [] for name in NAMED_FRACTIONS}
    for image in images:
        for budget, times in times_us.items():
            start = time.perf_counter()
            runtime.answer_tensor(image[None], budget=budget)
            times.append((time.perf_counter() - start) * 1e6)
    return {budget: float(np.median(times)) for budget, times in times_us.items()}


def _write_samples(folder: Path) -> tuple[Path, ...]:
    """Write a few test images, enlarged to a visible size."""
    images, labels = _test_images()
    paths = []
    for number, (image, label) in enumerate(zip(images[:SAMPLES], labels, strict=False), start=1):
        large = image.repeat(SAMPLE_SCALE, axis=0).repeat(SAMPLE_SCALE, axis=1)
        buffer = io.BytesIO()
        Image.fromarray(large).save(buffer, "PNG")
        paths.append(folder / f"{number}-shows-{label}.png")
        write_bytes(paths[-1], buffer.getvalue())
    return tuple(paths)
