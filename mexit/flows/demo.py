"""`mexit demo`: the whole pipeline on the embedded digits, with NEO-KD, ending in one table and one picture."""

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
from mexit.core.progress import Progress, Silent
from mexit.data import digits, splits
from mexit.flows.evaluate import evaluate_model
from mexit.flows.export import export_bundle
from mexit.flows.train import train_model
from mexit.runtime.runtime import Runtime

NAME = "demo"
SAMPLES = 6
SAMPLE_SCALE = 8
TIMED = 200


@dataclass(frozen=True)
class DemoResult:
    """What the demo made.

    Attributes:
        report: as `--json` prints it.
        latency_us: median time of one image at each budget, one at a time.
        picture: accuracy against MACs; None without matplotlib.
        samples: test images to try, named by what they show.
    """

    report: Mapping[str, Any]
    latency_us: Mapping[str, float]
    picture: Path | None
    samples: tuple[Path, ...]


def run_demo(*, threads: int | None = None, progress: Progress | None = None) -> DemoResult:
    """Train, export, calibrate and judge on the test split. Replaces `runs/demo` and `bundles/demo`."""
    progress = progress or Silent()
    start = time.monotonic()
    run, bundle = RUNS / NAME, BUNDLES / NAME
    if (run / "settings.json").exists():
        shutil.rmtree(run)
    # fp32, so that processors with and without bfloat16 end with the same figures.
    train_model(data="digits", given={"precision": "fp32"}, out=run, threads=threads, progress=progress)
    export_bundle(run, out=bundle, replace=True, progress=progress)
    evaluation = evaluate_model(bundle, samples=None, progress=progress)
    samples, latency_us = _samples(run / "samples"), _latencies(bundle)
    report = _report(evaluation.report, bundle, run, time.monotonic() - start)
    pictures = [path for path in evaluation.written if path.suffix == ".png"]
    return DemoResult(report, latency_us, pictures[0] if pictures else None, samples)


def _report(found: Mapping[str, Any], bundle: Path, run: Path, seconds: float) -> dict[str, Any]:
    """The keys of the command line's contract. `attacked` is the average attack."""
    costs = Runtime.open(bundle).bundle.manifest.cumulative_macs
    exits = [
        {
            "exit": row["exit"],
            "macs": macs,
            "clean": row["clean"]["value"],
            "attacked": row["average"]["value"],
        }
        for row, macs in zip(found["exits"], costs, strict=True)
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
        for name, row in found["budgets"].items()
    }
    return {
        "exits": exits,
        "budgets": budgets,
        "n": found["settings"]["n"],
        "attack": found["settings"]["attack"],
        "run": str(run),
        "bundle": str(bundle),
        "seconds": round(seconds, 1),
    }


def _test_images() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    data = digits.load()
    index = splits.split(data).part("test")
    return np.asarray(data.images.at(index), np.uint8), data.labels[index]


def _latencies(bundle: Path) -> dict[str, float]:
    """Median microseconds of one image at a time, budgets in turn."""
    runtime = Runtime.open(bundle)
    tensor = runtime.prepare(_test_images()[0][:TIMED, :, :, None].repeat(3, axis=3))
    names = ("low", "medium", "high", "full")
    times: dict[str, list[float]] = {name: [] for name in names}
    for row in range(len(tensor)):
        for name in names:
            begin = time.perf_counter()
            runtime.answer_tensor(tensor[row : row + 1], budget=name)
            times[name].append((time.perf_counter() - begin) * 1e6)
    return {name: float(np.median(values)) for name, values in times.items()}


def _samples(folder: Path) -> tuple[Path, ...]:
    """A few test images, enlarged so that people can see them."""
    from PIL import Image

    images, labels = _test_images()
    written = []
    for place in range(SAMPLES):
        large = images[place].repeat(SAMPLE_SCALE, axis=0).repeat(SAMPLE_SCALE, axis=1)
        buffer = io.BytesIO()
        Image.fromarray(large).save(buffer, "PNG")
        written.append(folder / f"{place + 1}-shows-{labels[place]}.png")
        write_bytes(written[-1], buffer.getvalue())
    return tuple(written)
