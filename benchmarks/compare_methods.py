"""Train and evaluate methods on one data set, compare them over the same images, and write the result page.

`mnist_methods.py` and `cifar10_methods.py` define the data set and the schedule.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods_under_autoattack import SAMPLES, autoattack, targets
from numpy.typing import NDArray
from page import ROOT, table, write_page
from stored_answers import RESULTS, Answers
from training_runs import hardware_name, machine_name, train_or_resume

from mexit.attacks.pgd import PGDConfig
from mexit.data import registry
from mexit.data.dataset import DataSet
from mexit.evaluate.suites import pgd_suite
from mexit.flows.train import TrainOptions
from mexit.models.device import resolve_device
from mexit.train import checkpoint
from mexit.train.precision import keep_freed_memory
from mexit.train.validation import correct_predictions, run_exits

BATCH = 250
ATTACKS = ("clean", "average", "max-average")
TRAINED_ON = "trained on"


@dataclass(frozen=True)
class Protocol:
    """One comparison.

    Attributes:
        name: name of the program and of its page.
        title: title of the page.
        about: first paragraph of the page: the schedule, declared before any run.
        data, model, preset: options of `mexit train`.
        schedule: settings that differ from the preset, the same for every method.
        recipes: further rows by name, with settings that replace the schedule's, network and method included.
        attack: PGD of the test, from one random start in float32.
        every: evaluate every n-th test image.
        images: number of test images that this makes.
        notes: last paragraph of the page: published results.
    """

    name: str
    title: str
    about: str
    data: str
    model: str
    preset: str
    schedule: dict[str, Any]
    attack: PGDConfig
    every: int
    images: int
    notes: str
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def settings(self, name: str, seed: int) -> dict[str, Any]:
        """Settings of a row: a method under the common schedule, or a recipe."""
        common = {**self.schedule, "model": self.model, "method": name}
        return {**common, **self.recipes.get(name, {}), "seed": seed}


@dataclass(frozen=True)
class Session:
    """Where and how one call of the program works.

    Attributes:
        protocol: the comparison.
        data: data set.
        device: "auto", "cpu" or "cuda".
        threads: CPU threads.
        runs: folder of the run directories.
        out: folder of the answers of each run.
        deadline_s: time, as of `time.time`, at which work stops; the next call continues it.
    """

    protocol: Protocol
    data: DataSet
    device: str
    threads: int
    runs: Path
    out: Path
    deadline_s: float

    def should_stop(self) -> bool:
        """Whether the deadline has passed."""
        return time.time() > self.deadline_s

    def complete(self, name: str, seed: int, with_autoattack: bool) -> None:
        """Train and evaluate a row, from where it was left, until it is complete or the deadline passes."""
        answers = Answers(self.out / f"{name}-{seed}.npz")
        run = ROOT / "zoo" / self.protocol.name / f"{name}-{seed}"
        if not run.exists():
            run = self.runs / f"{name}-{seed}"
            options = TrainOptions(device=self.device, threads=self.threads, should_stop=self.should_stop)
            settings = self.protocol.settings(name, seed)
            if not train_or_resume(run, self.protocol.data, self.protocol.preset, settings, options):
                return
            if not answers.note(TRAINED_ON):
                answers.add_note(TRAINED_ON, machine_name(self.device))
        if evaluate_run(self, run, answers) and with_autoattack:
            autoattack(run, answers, None, self.device, self.should_stop)


def evaluate_run(session: Session, run: Path, answers: Answers) -> bool:
    """Store which test images each exit classifies correctly: clean, average, max-average, one attack per exit.

    Every batch is stored when it is done. Returns whether all images are.
    """
    protocol, data = session.protocol, session.data
    model, settings, splits = checkpoint.load_model(run)
    model.to(resolve_device(session.device))
    index, spec = splits.part("test")[:: protocol.every], settings.model_spec().input
    while (done := answers.count("clean")) < len(index):
        if session.should_stop():
            return False
        part = index[done : done + BATCH]
        images, labels = data.batch(part, spec), data.labels[part]
        suite = pgd_suite(model, images, labels, part, protocol.attack)
        del suite["noise"]
        answers.extend(
            {name: correct_predictions(run_exits(model, attacked), labels) for name, attacked in suite.items()}
        )
    return True


def percent_correct(correct: NDArray[np.bool_]) -> str:
    """Percent with its binomial standard error."""
    value = correct.mean()
    return f"{100 * value:.2f} ({100 * np.sqrt(value * (1 - value) / len(correct)):.2f})"


def paired_difference(correct: NDArray[np.bool_], baseline: NDArray[np.bool_]) -> str:
    """Difference in points over the same images, with the standard error of the paired difference."""
    gain = 100 * (correct.astype(float) - baseline)
    return f"{gain.mean():+.2f} ({gain.std() / np.sqrt(len(gain)):.2f})"


def per_exit(runs: dict[str, Answers]) -> str:
    """Accuracy of every exit on clean images and under the two attacks of the papers."""
    rows = []
    for (name, answers), attack in itertools.product(runs.items(), ATTACKS):
        exits = answers.get(attack)
        rows.append([name, attack, *(percent_correct(row) for row in exits), f"{100 * exits.mean():.2f}"])
    return table(["run", "test images", *_exit_names(runs), "mean"], rows)


def differences(runs: dict[str, Answers]) -> str:
    """Every run minus the adversarial baseline of the same seed."""
    rows = []
    for name, answers in runs.items():
        method, _, seed = name.rpartition("-")
        baseline = runs.get(f"adversarial-{seed}")
        if method != "adversarial" and baseline is not None:
            for attack in ATTACKS:
                pairs = zip(answers.get(attack), baseline.get(attack), strict=True)
                rows.append([name, attack, *(paired_difference(ours, theirs) for ours, theirs in pairs)])
    columns = ["run minus adversarial", "test images", *_exit_names(runs)]
    return table(columns, rows) if rows else "Nothing to compare yet: no other method is finished."


def transfer(answers: Answers) -> str:
    """Accuracy of each exit under the attack on each exit."""
    exits = range(1, len(answers.get("clean")) + 1)
    rows = [[f"exit {k}", *(f"{100 * row.mean():.2f}" for row in answers.get(f"exit {k}"))] for k in exits]
    return table(["attacked", *(f"exit {k} answers" for k in exits)], rows)


def under_autoattack(runs: dict[str, Answers]) -> str:
    """AutoAttack on the same images for every run and target."""
    rows = []
    for name, answers in runs.items():
        method, _, seed = name.rpartition("-")
        baseline = runs.get(f"adversarial-{seed}")
        for condition in (f"autoattack {target}" for target in targets(len(answers.get("clean")))):
            if answers.count(condition) == SAMPLES:
                correct = answers.get(condition)[0]
                other = method != "adversarial" and baseline is not None and baseline.count(condition) == SAMPLES
                gain = paired_difference(correct, baseline.get(condition)[0]) if other else "-"
                rows.append([name, condition.removeprefix("autoattack "), percent_correct(correct), gain, len(correct)])
    columns = ["run", "attacked", "correct, % (standard error)", "minus adversarial, points", "n"]
    return table(columns, rows) if rows else "Not run yet."


def recipes(protocol: Protocol) -> list[str]:
    """The settings of the recipes, as paragraphs."""
    return [
        f"`{name}`: " + ", ".join(f"{setting} {value}" for setting, value in settings.items()) + "."
        for name, settings in protocol.recipes.items()
    ]


def write(protocol: Protocol, stored: dict[str, Answers]) -> None:
    """Write the result page from the runs whose evaluation is complete; the others are named."""
    n = protocol.images
    runs = {name: answers for name, answers in stored.items() if answers.count("clean") == n}
    if not runs:
        print("no run is evaluated on all images yet: there is no page to write")
        return
    pgd, unfinished = protocol.attack, sorted(stored.keys() - runs.keys())
    machines = {answers.note(TRAINED_ON) for answers in runs.values()} - {""}
    parts = [
        protocol.about,
        *recipes(protocol),
        f"Test: {n:,} images, PGD-{pgd.steps} in float32, eps {pgd.eps:.4g}, step {pgd.step_size:.4g}, one "
        "random start. Percent correct, standard error in brackets.",
        per_exit(runs),
        *([f"Not finished: {', '.join(unfinished)}."] if unfinished else []),
        "**Against the adversarial baseline**, in points, paired over the same images:",
        differences(runs),
        "**Transfer**: accuracy in percent of every exit under the attack on one exit.",
        *(f"{name}\n\n{transfer(answers)}" for name, answers in runs.items()),
        "**AutoAttack**, standard version. `policy medium` attacks the deployed policy: the hard choice of exits "
        "forward, the softened policy backward.",
        under_autoattack(runs),
        *([f"Trained on: {'; '.join(sorted(machines))}."] if machines else []),
        protocol.notes,
    ]
    write_page(protocol.name, hardware_name(machines), protocol.title, parts)


def main(protocol: Protocol) -> None:
    """Command line of a comparison."""
    parser = argparse.ArgumentParser(description=protocol.about)
    rows = f"methods or recipes ({', '.join(protocol.recipes)})" if protocol.recipes else "methods"
    parser.add_argument("rows", nargs="*", help=f"{rows} to train and evaluate; none = only write the page")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after these minutes; call again to go on")
    parser.add_argument("--autoattack", action="store_true", help="also AutoAttack, which takes about an hour on a CPU")
    parser.add_argument("--runs", type=Path, default=Path("runs") / protocol.name.replace("_", "-"))
    parser.add_argument("--out", type=Path, default=RESULTS / protocol.name, help="folder of the stored answers")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    if arguments.rows:
        data = registry.load(protocol.data, os.environ["MEXIT_DATA"])
        deadline_s = time.time() + 60 * arguments.minutes
        session = Session(
            protocol, data, arguments.device, arguments.threads, arguments.runs, arguments.out, deadline_s
        )
        for seed, name in itertools.product(arguments.seeds, arguments.rows):
            session.complete(name, seed, arguments.autoattack)
    write(protocol, {path.stem: Answers(path) for path in sorted(arguments.out.glob("*.npz"))})


def _exit_names(runs: dict[str, Answers]) -> list[str]:
    return [f"exit {k + 1}" for k in range(len(next(iter(runs.values())).get("clean")))]
