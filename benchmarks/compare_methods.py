"""Train and evaluate methods on one data set, compare them over the same images, and write the result page.

`mnist_methods.py` and `cifar10_methods.py` define the data set and the schedule.
"""

from __future__ import annotations

import argparse
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods_under_autoattack import TARGETS, autoattack
from numpy.typing import NDArray
from page import ROOT, table, write_page
from stored_answers import Answers

from mexit.attacks.pgd import PGDConfig
from mexit.data import registry
from mexit.data.dataset import DataSet, split_batches
from mexit.evaluate.suites import pgd_suite
from mexit.flows.train import TrainOptions, train_model
from mexit.models import model_spec
from mexit.train import checkpoint
from mexit.train.precision import keep_freed_memory
from mexit.train.validation import correct_predictions, run_exits

BATCH = 250
ATTACKS = ("clean", "average", "max-average")


@dataclass(frozen=True)
class Protocol:
    """One comparison.

    Attributes:
        name: name of the program and of its page.
        title: title of the page.
        about: first paragraph of the page: the schedule, declared before any run.
        data, model, preset: options of `mexit train`.
        schedule: settings that differ from the preset, the same for every method.
        attack: PGD of the test, from one random start in float32.
        every: evaluate every n-th test image.
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
    notes: str

    def run(self, method: str, seed: int, threads: int) -> Path:
        """The finished run of a method and a seed: from the zoo, or trained or resumed here."""
        stored = ROOT / "zoo" / self.name / f"{method}-{seed}"
        if stored.exists():
            return stored
        out = Path("runs") / self.name.replace("_", "-") / f"{method}-{seed}"
        if not (out / "weights.safetensors").exists():
            settings = {**self.schedule, "model": self.model, "method": method, "seed": seed}
            resume = (out / "settings.json").exists()
            train_model(
                data=self.data,
                preset=self.preset,
                settings=settings,
                out=out,
                resume=resume,
                options=TrainOptions(threads=threads),
            )
        return out


def evaluate_run(protocol: Protocol, run: Path, answers: Answers, data: DataSet) -> None:
    """Store which test images each exit classifies correctly: clean, average, max-average, one attack per exit."""
    if answers.has("clean"):
        return
    model, settings, splits = checkpoint.load_model(run)
    index, spec = splits.part("test")[:: protocol.every], model_spec(settings.model).input
    correct: dict[str, list[NDArray[np.bool_]]] = {}
    for part in split_batches(index, BATCH):
        images, labels = data.batch(part, spec), data.labels[part]
        suite = pgd_suite(model, images, labels, part, protocol.attack)
        del suite["noise"]
        for name, attacked in suite.items():
            correct.setdefault(name, []).append(correct_predictions(run_exits(model, attacked), labels))
    answers.add({name: np.concatenate(parts, axis=1) for name, parts in correct.items()})


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
        for condition in (f"autoattack {target}" for target in TARGETS):
            if answers.has(condition):
                correct = answers.get(condition)[0]
                other = method != "adversarial" and baseline is not None and baseline.has(condition)
                gain = paired_difference(correct, baseline.get(condition)[0]) if other else "-"
                rows.append([name, condition.removeprefix("autoattack "), percent_correct(correct), gain, len(correct)])
    columns = ["run", "attacked", "correct, % (standard error)", "minus adversarial, points", "n"]
    return table(columns, rows) if rows else "Not run yet."


def write(protocol: Protocol, runs: dict[str, Answers]) -> None:
    """Write the result page."""
    pgd, n = protocol.attack, len(next(iter(runs.values())).get("clean")[0])
    parts = [
        protocol.about,
        f"Test: {n:,} images, PGD-{pgd.steps} in float32, eps {pgd.eps:.4g}, step {pgd.step_size:.4g}, one "
        "random start. Percent correct, standard error in brackets.",
        per_exit(runs),
        "**Against the adversarial baseline**, in points, paired over the same images:",
        differences(runs),
        "**Transfer**: accuracy in percent of every exit under the attack on one exit.",
        *(f"{name}\n\n{transfer(answers)}" for name, answers in runs.items()),
        "**AutoAttack**, standard version. `policy medium` attacks the deployed policy: the hard choice of exits "
        "forward, the softened policy backward.",
        under_autoattack(runs),
        protocol.notes,
    ]
    write_page(protocol.name, "2-core-cpu", protocol.title, parts)


def main(protocol: Protocol) -> None:
    """Command line of a comparison."""
    parser = argparse.ArgumentParser(description=protocol.about)
    parser.add_argument("methods", nargs="*", help="methods to train and evaluate; none = only write the page")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--autoattack", action="store_true", help="also AutoAttack, which takes about an hour")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    data = registry.load(protocol.data, os.environ["MEXIT_DATA"])
    for method in arguments.methods:
        run = protocol.run(method, arguments.seed, arguments.threads)
        answers = Answers.of(protocol.name, run.name)
        evaluate_run(protocol, run, answers, data)
        if arguments.autoattack:
            autoattack(run, answers, data)
    write(protocol, Answers.all_of(protocol.name))


def _exit_names(runs: dict[str, Answers]) -> list[str]:
    return [f"exit {k + 1}" for k in range(len(next(iter(runs.values())).get("clean")))]
