"""The first items on a new card: tests/gpu, equality of graph and plain steps, and timed steps of every network."""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_parts
import torch
from context import ROOT, Context
from items import Item
from torch import Tensor

from mexit.data.dataset import DataSet
from mexit.data.splits import Splits, split
from mexit.errors import NotFound
from mexit.models.device import exact_float32, resolve_device
from mexit.train.config import resolve
from mexit.train.precision import select_precision
from mexit.train.trainer import Trainer

STEPS, WARM_UP = 20, 6
NETWORKS = (
    "wide-cnn", "wide-cnn-40m", "msdnet-cifar10", "resnet38", "mobilenetv2", "resnet18-single", "msdnet-cifar100",
    "small-cnn",
)  # fmt: skip
# Attack of the step, and whether it runs by CUDA graphs.
VARIANTS = (("average", True), ("average", False), ("max-average", True))
TOLERANCE = 1e-3  # largest relative difference of a weight tensor, beside the difference of two plain runs
PYTEST_OK = (0, 5)  # all passed, nothing collected
TESTS_S = 240.0


def gpu_tests(item: Item, context: Context) -> bool:
    """Run tests/gpu; failed tests are a result, not an error of the item."""
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "tests/gpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    limit_s = min(TESTS_S, context.deadline_s - time.monotonic())
    with (context.folder(item.name) / "pytest.txt").open("w+") as output:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, timeout=limit_s, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        output.seek(0)
        lines = output.read().splitlines()
    report = {"ran": True, "passed": code in PYTEST_OK, "finished": code is not None, "output": lines[-80:]}
    context.write(item.name, "tests.json", report)
    return True


def graphs_equal(item: Item, context: Context) -> bool:
    """Steps in float32 with and without graphs; the same without graphs twice, to know the noise of the card."""
    data, splits = _any_data(context)
    report = {}
    for attack in ("average", "max-average"):
        weights = []
        for graphs in (False, False, True):
            with exact_float32():
                trainer = _steps(data, splits, "wide-cnn", {"attack": attack, "precision": "fp32"}, graphs, context)
            weights.append({name: value.float().cpu() for name, value in trainer.model.state_dict().items()})
        noise, difference = _largest_difference(weights[0], weights[1]), _largest_difference(weights[0], weights[2])
        equal = difference <= TOLERANCE + 5 * noise
        report[attack] = {"equal": equal, "difference": difference, "difference of two plain runs": noise}
    context.write(item.name, "equality.json", report)
    return True


def timing(item: Item, context: Context) -> bool:
    """The median, shortest and longest of 20 steps of every network; one that fails leaves its error in the table."""
    data, splits = _any_data(context)
    rows: list[dict[str, Any]] = []
    for model in NETWORKS:
        for attack, graphs in VARIANTS:
            if graphs and not torch.cuda.is_available():
                continue
            row: dict[str, Any] = {"network": model, "attack": attack, "graphs": graphs}
            stamps: list[float] = []

            def stamp(stamps: list[float] = stamps) -> None:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                stamps.append(time.perf_counter())

            try:
                _steps(data, splits, model, {"attack": attack}, graphs, context, stamp)
            except Exception as error:  # the other networks are timed all the same
                rows.append(row | {"error": f"{type(error).__name__}: {error}"})
                continue
            seconds = [later - earlier for earlier, later in itertools.pairwise(stamps)]
            ms = [round(1000 * value, 3) for value in seconds[-STEPS:]]
            rows.append(row | {"median ms": statistics.median(ms), "min ms": min(ms), "max ms": max(ms), "n": len(ms)})
            print(rows[-1], flush=True)
    images = {"batch": _batch(context), "data": data.name, "precision": "bf16 where the device has it"}
    context.write(item.name, "timing.json", {"steps": rows, **images})
    return True


def _any_data(context: Context) -> tuple[DataSet, Splits]:
    """A data set that is here, CIFAR-10 first; every network takes pictures of every size."""
    for name in ("cifar10", "cifar100", "mnist"):
        try:
            data, present = data_parts.load(name, context.data_dir)
        except NotFound:
            continue
        return data, data_parts.present_splits(split(data), present)
    raise NotFound(f"no data set in {context.data_dir}: bring one, see README.md")


def _batch(context: Context) -> int:
    return 4 if context.miniature else 128


def _steps(
    data: DataSet,
    splits: Splits,
    model: str,
    settings: dict[str, Any],
    graphs: bool,
    context: Context,
    on_step: Callable[[], None] = lambda: None,
) -> Trainer:
    """Train a network for `WARM_UP + STEPS` steps on random batches and stop."""
    count = 3 if context.miniature else WARM_UP + STEPS
    taken = 0

    def should_stop() -> bool:
        nonlocal taken
        taken += 1
        on_step()
        return taken >= count

    common = {
        "model": model,
        "method": "adversarial",
        "batch": _batch(context),
        "steps": 1 if context.miniature else 7,
        "epochs": 10,
    }
    common |= {"eps": 8 / 255, "step": 2 / 255, "augment": "none"}
    resolved = resolve(data.name, "neo_kd", common | settings)
    precision = select_precision(resolved.precision, resolve_device("auto"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Path(folder), resolved, data, splits, precision, graphs=graphs)
        trainer.train(should_stop=should_stop)
    return trainer


def _largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of a tensor, relative to its norm."""
    return max(float((one[name] - other[name]).norm() / (1e-3 + one[name].norm())) for name in one)
