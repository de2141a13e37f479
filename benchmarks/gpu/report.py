"""Write the page of the networks that the run-book trained: accuracy per exit and of the policy medium.

    python benchmarks/gpu/report.py [--results DIR] [--name NAME]

Reads evaluation.json, autoattack.json, settings.json and where.json of every folder in DIR (default
benchmarks/results/gpu), and notes.md in DIR, which becomes the last paragraph.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from page import ROOT, table, write_page

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
ZOO = ROOT / "zoo" / "gpu"
CONDITIONS = ("clean", "average", "max-average", "transfer average", "transfer max-average", "autoattack")
ABOUT = """Percent correct on test images, with the standard error. `average` and `max-average` are PGD-50 in float32
from one random start; `transfer` are these attacks on the network that was trained without distillation; AutoAttack is
the standard version on 1,000 images. `medium` is the policy of that budget, with thresholds from the calibration split;
under PGD it sees the images that attack the exits. Its cost is the mean over the images."""


def rows(folder: Path) -> list[list[str]]:
    """The rows of one network: every exit, their mean, and the policy medium."""
    report = _read(folder / "evaluation.json")
    strong = _read(folder / "autoattack.json") if (folder / "autoattack.json").exists() else {}
    lines = []
    for row in report["exits"]:
        attacked = next((other for other in strong.get("exits", []) if other["exit"] == row["exit"]), {})
        lines.append([folder.name, f"exit {row['exit']}", *_cells(row | _only(attacked, "autoattack")), ""])
    mean = report["mean over exits"]
    lines.append([folder.name, "mean", *(f"{100 * mean[name]:.1f}" if name in mean else "" for name in CONDITIONS), ""])
    for name, row in report["budgets"].items():
        attacked = strong.get("budgets", {}).get(name, {})
        cost = f"{row['clean']['mean_macs'] / 1e6:.1f} M"
        lines.append([folder.name, f"`{name}`", *_cells(row | _only(attacked, "autoattack")), cost])
    return lines


def trained(folder: Path) -> list[str]:
    """How a network was trained: schedule, length and card."""
    settings, log = (
        next(path for path in (folder / name, ZOO / folder.name / name) if path.exists())
        for name in ("settings.json", "log.jsonl")
    )
    epochs = len(log.read_text().splitlines())
    stored = _read(settings)
    length = f"{stored['minutes']:g} minutes: " if stored["minutes"] else ""
    where = _read(folder / "where.json")
    return [
        folder.name,
        f"{stored['preset']}, {stored['method']}",
        f"{length}{epochs} epochs in steps of {stored['batch']} images",
        f"{where['card']}, torch {where['torch']}",
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="gpu_networks")
    arguments = parser.parse_args()
    notes = arguments.results / "notes.md"
    folders = sorted(path.parent for path in arguments.results.glob("*/evaluation.json"))
    if not folders:
        sys.exit(f"{arguments.results} has no */evaluation.json: bring results with pack.py import")
    cards = sorted(
        {_read(folder / "where.json")["card"].removeprefix("NVIDIA ").split()[0].lower() for folder in folders}
    )
    columns = ["network", "answer of", *(f"{name}, %" for name in CONDITIONS), "mean MACs, clean"]
    parts = [
        ABOUT,
        table(["network", "preset and method", "length", "card"], [trained(folder) for folder in folders]),
        table(columns, [row for folder in folders for row in rows(folder)]),
        notes.read_text().strip() if notes.exists() else "",
    ]
    write_page(
        arguments.name, "-".join(cards), "Networks trained by the GPU run-book", [part for part in parts if part]
    )


def _cells(row: dict[str, Any]) -> list[str]:
    entries = [row.get(name) for name in CONDITIONS]
    return ["" if one is None else f"{100 * one['value']:.1f} ({100 * one['stderr']:.1f})" for one in entries]


def _only(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: row[name]} if name in row else {}


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


if __name__ == "__main__":
    main()
