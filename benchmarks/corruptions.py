"""Measure accuracy and cost of the zoo's networks under the 15 common corruptions.

    MEXIT_DATA=DIR python benchmarks/corruptions.py [RUN...] [--samples 1000]

Each run of the zoo is exported and calibrated on its calibration split (bundles/zoo-corruptions/...; an existing bundle
is used again). Its bundle is evaluated in ONNX Runtime on evenly spaced test images: every exit, and every budget with
its calibrated policy. `mexit evaluate BUNDLE --attacks corruptions` gives the same figures for one bundle.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from compare_methods import paired_difference
from numpy.typing import NDArray
from page import ROOT, table, write_page

from mexit.attacks.corruptions import SEVERITIES
from mexit.core.budget import short_macs
from mexit.core.bundle import POLICIES
from mexit.core.progress import Silent
from mexit.evaluate.corruptions import corruption_report, run_corruptions_group
from mexit.evaluate.target import open_target
from mexit.flows.calibrate import CalibrateOptions, calibrate_bundle
from mexit.flows.export import ExportOptions, export_bundle

ABOUT = """Corruptions, severities and parameters of D. Hendrycks and T. Dietterich (ICLR 2019), those of CIFAR-10-C for
both data sets; our own implementation (`mexit/attacks/corruptions.py` states the differences; `frost` is the largest:
its ice is generated). Accuracies in percent. *corrupted* is the mean over all 15 corruptions and 5 severities, *drop*
is clean minus corrupted. Standard errors in brackets are over images, after averaging the 75 conditions of each image,
and drops are paired. Costs are mean MACs. Thresholds were selected on clean images of the calibration split."""
NOTES = """Result, with one seed each. No budget drops by more than 0.04 points more than the last exit does. Mean
costs rise under corruption, because fewer images exit early. On MNIST they rise by 28 (`low`), 16 (`medium`) and 7
percent (`high`) with `adversarial`, above the budget, which holds on data like the calibration data alone; on
CIFAR-10 by 2 to 5 percent. The costliest corruptions are contrast and glass blur on MNIST (`low` up to 2.3 times its
clean cost) and fog on CIFAR-10 (1.16 times). Contrast also takes the most accuracy on both. On MNIST exit 1 loses
twice as much as the last exit. NEO-KD is below `adversarial` under corruption: by 0.2 to 0.4 points on MNIST, and on
CIFAR-10, where its clean accuracy is lower as well, by 0.8 at exit 1 and 3.2 at exit 3.

Not measured: more than one training seed, and networks trained without attacks, of which the zoo has none."""


@dataclass(frozen=True)
class Measured:
    """One network under all corruptions.

    Attributes:
        report: as `corruption_report` returns it.
        per_image: share of the 75 conditions under which each exit, and then each budget, classifies an image
            correctly, (E + budgets, N).
        limits: largest mean cost that each budget promises on clean images, MACs.
    """

    report: Mapping[str, Any]
    per_image: NDArray[np.float64]
    limits: Mapping[str, float]

    @property
    def names(self) -> list[str]:
        """The exits, then the budgets."""
        clean = self.report["clean"]
        return [f"exit {k}" for k in range(1, len(clean["exits"]) + 1)] + list(clean["budgets"])


def measure(run: Path, samples: int) -> Measured:
    """Export and calibrate a run if its bundle is missing, and evaluate it under all corruptions."""
    data_dir = os.environ["MEXIT_DATA"]
    out = Path("bundles/zoo-corruptions") / f"{run.parent.name}-{run.name}"
    if not out.exists():
        export_bundle(run, out=out, data_dir=data_dir, options=ExportOptions(calibrate=False, exits="all"))
    if not (out / POLICIES).exists():
        calibrate_bundle(out, data_dir=data_dir, options=CalibrateOptions(attack="none"))
    target = open_target(out, data_dir, "ort", "cpu")
    index = target.test_index(samples)
    images, labels = target.load(index)
    outcomes = run_corruptions_group(target, index, Silent())
    exits = np.mean([outcome.correct for outcome in outcomes.values()], axis=0)
    budgets = [
        np.mean([outcome.decisions[name].classes == labels for outcome in outcomes.values()], axis=0)
        for name in target.budgets
    ]
    report = corruption_report(outcomes, target.exit_logits(images), labels, target)
    limits = {name: budget.budget_macs for name, budget in target.budgets.items()}
    return Measured(report, np.concatenate([exits, budgets]), limits)


def summary(networks: Mapping[str, Measured]) -> str:
    """Every exit and budget: clean and corrupted accuracy, drop, cost and exits taken."""
    rows = []
    for network, measured in networks.items():
        clean, mean = measured.report["clean"], measured.report["mean"]
        pairs = zip(entries(clean), entries(mean), strict=True)
        for name, (before, after) in zip(measured.names, pairs, strict=True):
            cost, taken = "", ""
            if "mean_macs" in after:
                limit = short_macs(measured.limits[name])
                cost = f"{short_macs(before['mean_macs'])} to {short_macs(after['mean_macs'])}, budget {limit}"
                shares = np.array(before["exits"]) / before["n"]
                taken = f"{percents(shares)} to {percents(after['exit_shares'])}"
            corrupted = f"{100 * after['value']:.2f} ({100 * after['stderr']:.2f})"
            drop = f"{100 * after['drop']:.2f} ({100 * after['drop_stderr']:.2f})"
            rows.append([network, name, f"{100 * before['value']:.2f}", corrupted, drop, cost, taken])
    columns = ["network", "exit or budget", "clean", "corrupted", "drop", "mean MACs, clean to corrupted"]
    return table([*columns, "exits taken in percent, clean to corrupted"], rows)


def per_corruption(measured: Measured) -> str:
    """Accuracy of every exit and accuracy and cost of every budget under each corruption, mean over severities."""
    report = measured.report
    named = [("clean", report["clean"]), *((row["corruption"], row) for row in report["per_corruption"])]
    rows = [[name, *map(cell, entries(row))] for name, row in [*named, ("mean of corruptions", report["mean"])]]
    return table(["corruption", *measured.names], rows)


def per_severity(measured: Measured) -> str:
    """The same at each severity, mean over corruptions."""
    conditions, rows = measured.report["conditions"], []
    for severity in SEVERITIES:
        group = [entries(row) for row in conditions if row["severity"] == severity]
        means = []
        for same in zip(*group, strict=True):
            keys = ("value", "mean_macs") if "mean_macs" in same[0] else ("value",)
            means.append({key: float(np.mean([entry[key] for entry in same])) for key in keys})
        rows.append([severity, *map(cell, means)])
    return table(["severity", *measured.names], rows)


def against_baseline(networks: Mapping[str, Measured]) -> str:
    """Corrupted accuracy of each network minus the adversarial one's on the same data and images."""
    rows, names = [], next(iter(networks.values())).names
    for network, measured in networks.items():
        folder, _, run = network.partition("/")
        baseline = networks.get(f"{folder}/adversarial-{run.rpartition('-')[2]}")
        if baseline is not None and baseline is not measured and baseline.names == names:
            pairs = zip(measured.per_image, baseline.per_image, strict=True)
            rows.append([network, *(paired_difference(ours, theirs) for ours, theirs in pairs)])
    return table(["network minus adversarial, points", *names], rows) if rows else "No network has a baseline here."


def entries(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries of the exits, then of the budgets."""
    return [*row["exits"], *row["budgets"].values()]


def cell(entry: Mapping[str, Any]) -> str:
    """Accuracy, and the mean MACs of a budget."""
    cost = f", {short_macs(entry['mean_macs'])}" if "mean_macs" in entry else ""
    return f"{100 * entry['value']:.1f}{cost}"


def percents(shares: NDArray[np.float64] | list[float]) -> str:
    """Shares of the exits in percent: `62 / 30 / 8`."""
    return " / ".join(f"{100 * share:.0f}" for share in shares)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="default: every run of the zoo")
    parser.add_argument("--samples", type=int, default=1000, help="test images")
    arguments = parser.parse_args()
    runs = arguments.runs or sorted(path.parent for path in (ROOT / "zoo").glob("*/*/weights.safetensors"))
    networks = {f"{run.parent.name}/{run.name}": measure(run, arguments.samples) for run in runs}
    parts = [ABOUT, f"{arguments.samples:,} test images for each network.", summary(networks)]
    parts += ["**Against the adversarial baseline**, paired over the same images, under all corruptions:"]
    parts += [against_baseline(networks)]
    for network, measured in networks.items():
        parts += [f"**{network}**: accuracy, and mean MACs of budgets, mean over severities", per_corruption(measured)]
        parts += [f"**{network}**: the same at each severity, mean over corruptions", per_severity(measured)]
    write_page("corruptions", "2-core-cpu", "Common corruptions", [*parts, NOTES])


if __name__ == "__main__":
    main()
