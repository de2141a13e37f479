"""Measure the held-out accuracy of the policy `search` minus that of `geometric` at equal budgets.

    MEXIT_DATA=DIR python benchmarks/search_against_geometric.py [--seeds 4] [--epochs 3]

For each seed a `small-cnn` is trained for 3 epochs on 4,000 MNIST images without attacks (a weak network, because on
a fully trained one the difference is close to 0). Thresholds are selected on the calibration split and measured on
the certification split; the test split is not used. The same is done under an average attack, which causes many
errors.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from page import table, write_page

from mexit.attacks.pgd import Attack, PGDConfig
from mexit.calibrate.frontier import frontier
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.cost import Costs
from mexit.core.resource_limits import read_limits
from mexit.core.scores import Scorer
from mexit.core.trace import Origin, Trace
from mexit.data import registry
from mexit.data.dataset import evenly_spaced
from mexit.data.splits import Splits, split
from mexit.train.config import resolve
from mexit.train.precision import select_precision
from mexit.train.trainer import Trainer
from mexit.train.validation import attacked_batches, exit_logits

TRAINING_IMAGES = 4_000
COSTS = Costs((1_015_440, 8_529_056, 11_135_152), 11_135_152)  # of small-cnn, as `mexit models` counts them
CONDITIONS = {"clean": None, "attacked, eps 0.1": Attack("average", PGDConfig(0.1, 0.02, 10))}


def traces(seed: int, epochs: int, attacked_samples: int) -> dict[str, dict[str, Trace]]:
    """Train a network and return its traces by condition and split."""
    data = registry.load("mnist", os.environ["MEXIT_DATA"])
    splits = split(data)
    settings = resolve("mnist", None, {"method": "clean", "epochs": epochs, "seed": seed, "lr": 0.02, "batch": 64})
    with tempfile.TemporaryDirectory() as folder:
        small = Splits(
            splits.data_set, splits.data_sha256, {**splits.parts, "train": splits.part("train")[:TRAINING_IMAGES]}
        )
        trainer = Trainer(Path(folder), settings, data, small, select_precision("auto", "cpu"))
        trainer.train()
    model, spec = trainer.model.to(memory_format=torch.contiguous_format), settings.model_spec().input
    by_condition: dict[str, dict[str, Trace]] = {}
    for condition, attack in CONDITIONS.items():
        for name in ("calibration", "certification"):
            index = splits.part(name) if attack is None else evenly_spaced(splits.part(name), attacked_samples)
            logits = exit_logits(model, attacked_batches(model, data, index, spec, attack))
            origin = Origin(f"seed {seed}", "fp32", "torch", "fp32", name, condition, data.sha256)
            by_condition.setdefault(condition, {})[name] = Trace(logits, data.labels[index], index, origin)
    return by_condition


def differences(splits: dict[str, Trace]) -> tuple[dict[str, list[float]], list[float], float]:
    """Differences of samples (search - geometric) per named budget, their means per budget, and the full accuracy."""
    scorer = Scorer("max-probability", False, (1.0,) * 3, 10)
    calibration, held_out = (
        TraceEvaluator.of(splits[name], scorer, COSTS) for name in ("calibration", "certification")
    )
    searched, named = frontier(calibration, None, None, {}, "search")
    geometric, _ = frontier(calibration, None, None, {}, "geometric")
    labels = held_out.labels

    def gain(index: int) -> np.ndarray:
        ours, theirs = (
            (held_out.answers(points[index].thresholds) == labels).astype(float) for points in (searched, geometric)
        )
        return ours - theirs

    per_name = {name: gain(named[name]).tolist() for name in ("low", "medium", "high")}
    return (
        per_name,
        [float(gain(index).mean()) for index in range(1, len(searched) - 1)],
        float((held_out.predictions[-1] == labels).mean()),
    )


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--attacked-samples", type=int, default=2400, help="of each split")
    arguments = parser.parse_args()
    torch.set_num_threads(read_limits().threads)
    samples: dict[str, dict[str, list[float]]] = {}
    over_budgets: dict[str, list[float]] = {}
    accuracy: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        for condition, splits in traces(seed, arguments.epochs, arguments.attacked_samples).items():
            per_name, budgets, full = differences(splits)
            for name, values in per_name.items():
                samples.setdefault(condition, {}).setdefault(name, []).extend(values)
            over_budgets.setdefault(condition, []).append(100 * float(np.mean(budgets)))
            accuracy.setdefault(condition, []).append(100 * full)
    parts = [__doc__.split("\n\n", 2)[2]]
    for condition, names in samples.items():
        rows = []
        for name, values in names.items():
            mean, error = 100 * np.mean(values), 100 * np.std(values) / np.sqrt(len(values))
            rows.append([name, f"{mean:+.3f}", f"{error:.3f}", f"{mean - 1.645 * error:+.3f}", len(values), "-0.2"])
        mean = np.mean(over_budgets[condition])
        spread = f"{min(over_budgets[condition]):+.3f} to {max(over_budgets[condition]):+.3f}"
        rows.append(["mean over 39 budgets", f"{mean:+.3f}", spread, "", f"{arguments.seeds} seeds", "0 (mean)"])
        parts += [
            f"**{condition}**; full network {np.mean(accuracy[condition]):.2f} % correct on held-out data. In points:",
            table(["budget", "search - geometric", "standard error", "lower 95 %", "n", "at least"], rows),
        ]
    write_page("search_against_geometric", "2-core-cpu", "Threshold search against the geometric protocol", parts)


if __name__ == "__main__":
    main()
