"""From a folder of pictures to a calibrated bundle: duration, expected and test results over seeds of the split.

    python benchmarks/own_pictures.py PICTURES [--seeds 0 1 2 3 4] [--runs runs/own-pictures]

PICTURES has train/ and test/ with one folder per class, such as GTSRB. For each seed it runs `mexit train --data
folder:PICTURES --split-seed SEED` and `mexit export`, without further options, as a user types them, and reads the
table that the export wrote. A finished seed is not run again, and one that was stopped goes on from its checkpoint.
Durations are true on a quiet machine only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from page import table, write_page
from training_runs import hardware_name, machine_name

from mexit.calibrate import expected
from mexit.core.atomic_io import to_json, write_bytes
from mexit.core.budget import short_macs
from mexit.train import checkpoint

MAX_SECONDS = 720
MAX_HALF_WIDTH = 0.06
ENOUGH_SEEDS = 0.8
ABOUT = """Each seed draws another split of the training folder; the test folder is the same, and selects nothing.
Expected results are measured on the certification split. The interval is that of the difference between test and
expected accuracy at 95 %; the errors of both sides are counted by group (track of one physical sign), not by picture.
"Cost too high": the mean test cost is significantly (95 %) more than 5 % above the expected one."""


def run_seed(pictures: Path, seed: int, runs: Path) -> Path:
    """Train and export one seed, from where it was left. Returns the file of its result."""
    run, bundle, done = (runs / f"{kind}-{seed}" for kind in ("run", "bundle", "done"))
    if done.exists():
        return done
    seconds = {}
    begin = ["--resume"] if (run / checkpoint.CHECKPOINT).exists() else []
    begin += ["--data", f"folder:{pictures}", "--split-seed", str(seed), "--out", str(run)]
    if not (run / checkpoint.WEIGHTS).exists():
        seconds["train"] = mexit("train", *begin)
    seconds["export"] = mexit("export", str(run), "--out", str(bundle), "--replace")
    entries = json.loads((bundle / expected.FILE).read_bytes())["entries"]
    settings = json.loads((run / checkpoint.SETTINGS).read_bytes())
    result = {"seed": seed, "seconds": seconds, "resumed": begin[0] == "--resume", "table": entries[0]}
    write_bytes(done, to_json(result | {"settings": settings, "machine": machine_name("auto")}))
    return done


def mexit(*arguments: str) -> float:
    """Run a command of mexit; returns its duration in seconds."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "mexit", *arguments], check=True)
    return time.monotonic() - start


def budget_rows(results: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """One row for each seed and policy."""
    for result in results:
        for row in result["table"]["budgets"]:
            accuracy, cost = row["accuracy"], row["cost"]
            costs = [short_macs(cost[side]["value"]) for side in ("expected", "test")]
            yield [
                str(result["seed"]),
                ", ".join(row["names"]),
                *(f"{accuracy[side]['value']:.1%}" for side in ("expected", "test")),
                f"{100 * accuracy['difference']:+.1f}",
                f"±{100 * accuracy['half_width']:.1f}",
                "no" if accuracy["outside"] else "yes",
                *costs,
                "yes" if cost["too_high"] else "no",
            ]


def verdicts(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the page states about each target, one sentence each."""
    names = [name for row in results[0]["table"]["budgets"] for name in row["names"]]
    inside = {name: sum(not _row(one, name)["accuracy"]["outside"] for one in results) for name in names}
    too_high = {name: sum(_row(one, name)["cost"]["too_high"] for one in results) for name in names}
    full = [_row(one, "full")["accuracy"] for one in results]
    width, accuracy = max(row["half_width"] for row in full), [row["test"]["value"] for row in full]
    durations = [sum(one["seconds"].values()) for one in results if "train" in one["seconds"] and not one["resumed"]]
    count = len(results)
    return [
        f"Test accuracy inside its interval, of {count} seeds: {_counts(inside)} "
        f"(target: at least {ENOUGH_SEEDS:.0%} each): {_word(min(inside.values()) >= ENOUGH_SEEDS * count)}.",
        f"Largest half-width at `full`: {100 * width:.1f} points (at most {100 * MAX_HALF_WIDTH:.0f}): "
        f"{_word(width <= MAX_HALF_WIDTH)}.",
        f"Cost too high, of {count} seeds: {_counts(too_high)} (target: none): {_word(not any(too_high.values()))}.",
        f"Longest duration of train and export together: {max(durations, default=float('nan')):.0f} s (at most "
        f"{MAX_SECONDS}): {_word(bool(durations) and max(durations) <= MAX_SECONDS)}.",
        f"Test accuracy at `full`: {', '.join(f'{value:.1%}' for value in accuracy)} (target: 95 %): "
        f"{_word(min(accuracy) >= 0.95)}.",
    ]


def _row(result: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    row: Mapping[str, Any] = next(row for row in result["table"]["budgets"] if name in row["names"])
    return row


def _counts(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in values.items())


def _word(met: bool) -> str:
    return "met" if met else "**missed**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="folder with train/ and test/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of the split")
    parser.add_argument("--runs", type=Path, default=Path("runs/own-pictures"), help="folder of runs and bundles")
    arguments = parser.parse_args()
    done = [run_seed(arguments.pictures, seed, arguments.runs) for seed in arguments.seeds]
    results = [json.loads(path.read_bytes()) for path in done]
    durations = [
        [str(one["seed"]), *(f"{one['seconds'].get(step, float('nan')):.0f}" for step in ("train", "export"))]
        for one in results
    ]
    sizes = [
        f"{part}: {size['n']} pictures in {size['groups']} groups"
        for part in ("certification", "test")
        if (size := results[0]["table"][part])
    ]
    settings = results[0]["settings"]
    columns = ["seed", "budget", "expected", "test", "difference", "interval", "inside", "expected MACs", "test MACs"]
    parts = [
        ABOUT,
        f"`{settings['model']}` at {settings['size']} pixels, {settings['minutes']:g} minutes. {'; '.join(sizes)} "
        f"(seed {results[0]['seed']}). {os.getloadavg()[0]:.1f} busy threads on the machine at the end.",
        *verdicts(results),
        table([*columns, "cost too high"], list(budget_rows(results))),
        table(["seed", "train, s", "export, s"], durations),
    ]
    hardware = hardware_name({one["machine"] for one in results})
    write_page("own_pictures", hardware, f"{arguments.pictures.name}: from pictures to a calibrated bundle", parts)


if __name__ == "__main__":
    main()
