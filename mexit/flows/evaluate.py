"""`mexit evaluate`: accuracy on the test split, per exit and per budget, clean and under attack.

A run is judged in torch. A bundle is judged as deployed: attacked images are made with the gradients of the run
behind it, answered by the exported segments, and decided by the calibrated policies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.bundle import Bundle
from mexit.core.confidence import Scorer
from mexit.core.cost import exit_counts, mean_macs
from mexit.core.files import to_json, write_bytes
from mexit.core.policies import PolicyEntry
from mexit.core.policy import first_exit
from mexit.data import catalog
from mexit.data.dataset import DataSet
from mexit.data.splits import Splits
from mexit.errors import UsageError, missing_extra
from mexit.flows import gradients, plots
from mexit.flows.defaults import BUNDLES, RUNS, is_bundle, newest
from mexit.flows.progress import Progress, Silent
from mexit.runtime.reference import run_all_exits
from mexit.runtime.runtime import Runtime

BATCH = 128
SAMPLES = 1000
REPORTS = Path("reports")

Logits = NDArray[np.float32]
Judged = dict[str, Logits]


@dataclass(frozen=True)
class EvaluateResult:
    """What was found.

    Attributes:
        report: as `--json` prints it: exits, budgets, transfer, settings.
        written: JSON and pictures.
    """

    report: Mapping[str, Any]
    written: tuple[Path, ...]


def evaluate(
    source: Path | None = None,
    *,
    data_dir: str | Path | None = None,
    samples: int | None = SAMPLES,
    eps: float | None = None,
    steps: int | None = None,
    backend: str = "auto",
    progress: Progress | None = None,
) -> EvaluateResult:
    """Evaluate a run or a bundle on the test split.

    Args:
        source: a run or a bundle; default the newest bundle, else the newest run.
        data_dir: where data sets lie; default `MEXIT_DATA`.
        samples: at most so many test images, evenly spaced; None = all.
        eps, steps: of the attacks; default the run's own test setting.
        backend: the engine of a bundle.
        progress: who listens.
    """
    progress = progress or Silent()
    path = source or _newest(progress)
    if is_bundle(path):
        runtime = Runtime.open(path, "full", backend=backend)
        network = gradients.of_bundle(runtime.bundle)
        stored = runtime.bundle.splits()
        if stored is None:
            raise UsageError(f"{path} stores no splits, so it is not known which images are for testing")
        splits = Splits.from_bytes(stored, path / "splits.npz")
    else:
        runtime, (network, splits) = None, _open_run(path)
    data = catalog.load(network.settings.data, data_dir)
    splits.check(data)
    index = _subset(splits.part("test"), samples)
    attack = network.attack("average", eps, steps)
    answer = _torch_answer(network) if runtime is None else _bundle_answer(runtime)
    judged = _judge(network, data, index, attack.steps, answer, progress)
    labels = data.labels[index]
    report = {
        "exits": _per_exit(judged, labels),
        "budgets": {} if runtime is None else _per_budget(runtime, judged, labels),
        "transfer": _transfer(judged, labels),
        "settings": _settings(path, data, index, splits, attack),
    }
    return EvaluateResult(report, _write(path, report, runtime))


def accuracy(right: NDArray[np.bool_]) -> dict[str, float | int]:
    """A share of right answers with its binomial standard error."""
    value, n = float(right.mean()), len(right)
    return {"value": value, "n": n, "stderr": float(np.sqrt(value * (1 - value) / n))}


def _newest(progress: Progress) -> Path:
    return newest(BUNDLES if (BUNDLES / "latest").exists() else RUNS, progress)


def _open_run(run: Path) -> tuple[gradients.Source, Splits]:
    try:
        from mexit.train import checkpoint
    except ImportError as error:
        raise missing_extra(error.name or "torch", "train", "Evaluating a run") from None
    model, settings, splits = checkpoint.load_model(run)
    return gradients.Source(model, settings), splits


def _subset(index: NDArray[np.int64], samples: int | None) -> NDArray[np.int64]:
    if samples is not None and samples < 1:
        raise UsageError(f"--samples must be at least 1, found {samples}")
    if samples is None or samples >= len(index):
        return index
    return index[np.linspace(0, len(index) - 1, samples).astype(np.int64)]


def _torch_answer(network: gradients.Source) -> Callable[[Logits], Logits]:
    from mexit.train.evaluate import run_exits

    return lambda images: run_exits(network.model, images)


def _bundle_answer(runtime: Runtime) -> Callable[[Logits], Logits]:
    return lambda images: run_all_exits(runtime.backend, images)


def _judge(
    network: gradients.Source,
    data: DataSet,
    index: NDArray[np.int64],
    steps: Any,
    answer: Callable[[Logits], Logits],
    progress: Progress,
) -> Judged:
    """Logits (E, N, C) under every condition: clean, average, max-average, and one attack an exit."""
    from mexit.train.evaluate import attack_suite
    from mexit.train.models import preset

    spec = preset(network.settings.model).input
    found: dict[str, list[Logits]] = {}
    with progress.track(f"attacking {len(index)} test images", len(index)) as advance:
        for part in np.array_split(index, range(BATCH, len(index), BATCH)):
            images, labels = data.batch(part, spec), data.labels[part]
            conditions = {"clean": images, **attack_suite(network.model, images, labels, part, steps)}
            for name, attacked in conditions.items():
                found.setdefault(name, []).append(answer(attacked))
            advance(len(part), "")
    return {name: np.concatenate(parts, axis=1) for name, parts in found.items()}


def _per_exit(judged: Judged, labels: NDArray[np.int64]) -> list[dict[str, Any]]:
    from mexit.train.evaluate import right

    rows: list[dict[str, Any]] = []
    for k in range(len(judged["clean"])):
        shown = ("clean", "average", "max-average")
        rows.append({"exit": k + 1} | {name: accuracy(right(judged[name], labels)[k]) for name in shown})
    return rows


def _transfer(judged: Judged, labels: NDArray[np.int64]) -> list[list[dict[str, Any]]]:
    """Row: the exit that was attacked; column: the exit that answers."""
    from mexit.train.evaluate import right

    count = len(judged["clean"])
    return [[accuracy(row) for row in right(judged[f"exit {k}"], labels)] for k in range(1, count + 1)]


def _per_budget(runtime: Runtime, judged: Judged, labels: NDArray[np.int64]) -> dict[str, Any]:
    if not runtime.calibrated:
        return {}
    bundle, backend = runtime.bundle, runtime.backend
    entry = bundle.policies().entry(backend.engine, backend.precision, backend.variant)
    return {name: _budget_row(bundle, entry, name, judged, labels) for name in entry.named}


def _budget_row(
    bundle: Bundle, entry: PolicyEntry, name: str, judged: Judged, labels: NDArray[np.int64]
) -> dict[str, Any]:
    costs, classes = bundle.manifest.cumulative_macs, len(bundle.manifest.classes)
    point = entry.frontier[entry.named[name]]
    scorer = Scorer(entry.measure, entry.ensemble, entry.temperatures, classes)
    row: dict[str, Any] = {"budget_macs": point.budget_macs}
    for condition in ("clean", "average", "max-average"):
        scores, predictions = scorer.answer(judged[condition])
        exits = first_exit(scores, point.thresholds)
        right = predictions[exits - 1, np.arange(len(labels))] == labels
        cost = mean_macs(exits, costs)
        row[condition] = accuracy(right) | {
            "mean_macs": cost,
            "saved": 1 - cost / costs[-1],
            "exits": exit_counts(exits, len(costs)).tolist(),
        }
    return row


def _settings(path: Path, data: DataSet, index: NDArray[np.int64], splits: Splits, attack: Any) -> dict[str, Any]:
    return {
        "source": str(path),
        "data": data.name,
        "data_sha256": data.sha256,
        "split": "test",
        "n": len(index),
        "of": len(splits.part("test")),
        "attack": attack.describe(),
        "seed": 0,
        "precision": "fp32",
    }


def _write(path: Path, report: Mapping[str, Any], runtime: Runtime | None) -> tuple[Path, ...]:
    written = [path / REPORTS / "evaluation.json"]
    write_bytes(written[0], to_json(report))
    if runtime is not None and report["budgets"] and plots.available():
        written.append(path / REPORTS / "evaluation.png")
        plots.accuracy_against_macs(*_picture(runtime, report), written[-1], f"{path.name}: test split")
    return tuple(written)


def _picture(runtime: Runtime, report: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    costs = runtime.bundle.manifest.cumulative_macs
    lines: dict[str, Any] = {}
    for name, condition in (("clean", "clean"), ("attacked", "average")):
        lines[f"{name}, per budget"] = [
            (row[condition]["mean_macs"], row[condition]["value"]) for row in report["budgets"].values()
        ]
        lines[f"{name}, single exits"] = [
            (costs[row["exit"] - 1], row[condition]["value"]) for row in report["exits"]
        ]
    return lines, {name: row["budget_macs"] for name, row in report["budgets"].items()}
