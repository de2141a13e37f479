"""Find a network and a training recipe for MNIST at the cost of `small-cnn`, judged on the selection split alone.

    PYTHONPATH=. python benchmarks/mnist_recipes.py --minutes 8 --jobs 4 --data DIR --out DIR     run trials
    PYTHONPATH=. python benchmarks/mnist_recipes.py --page [--out DIR]                            write the page

A trial is a network and settings of `mexit train`, declared in `TRIALS` before any of them ran. Each trial trains on
the training split in its own process and is then attacked on 500 images of the selection split; the test split is not
read. Trials whose result is stored in results/mnist_recipes/ or in --out are not run again. A trial that was stopped or
killed goes on from its last checkpoint (RUNS/TRIAL-SEED), which is at most a minute old.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from page import table, write_page
from stored_answers import RESULTS
from training_runs import hardware_name, machine_name, train_or_resume

from mexit.attacks.autoattack import AutoAttackConfig, ExitClassifier, auto_attack
from mexit.attacks.pgd import Attack, PGDConfig
from mexit.core.atomic_io import write_bytes
from mexit.core.budget import short_macs
from mexit.data import registry
from mexit.data.dataset import evenly_spaced
from mexit.flows.train import TrainOptions
from mexit.models import MultiExit
from mexit.models.device import device_of, exact_float32, resolve_device
from mexit.models.exit_costs import exit_costs
from mexit.train import checkpoint
from mexit.train.precision import keep_freed_memory
from mexit.train.validation import attack_images, correct_predictions, run_exits

NAME = "mnist_recipes"
IMAGES = 500  # of the selection split, evenly spaced
EPS = 0.3
# An image withstands PGD at an exit if it withstands all of these attacks on that exit.
PGD = tuple(
    Attack("single", PGDConfig(EPS, step, 100, restarts=2), loss=loss)
    for loss in ("ce", "margin")
    for step in (0.01, 0.04)
)
AUTOATTACK = AutoAttackConfig(steps=100, queries=1000, targets=3, batch=IMAGES)

ABOUT = """Every trial was declared before it ran. It trains on the training split (48,000 images) and is judged
on 500 images of the selection split, which no training step sees, in float32 at eps 0.3. "PGD": the image withstands
PGD-100 on the exit, with cross-entropy and margin loss, steps of 0.01 and 0.04, two random starts each. "AutoAttack": a
reduced AutoAttack on the exit, with 3 target classes instead of 9 and 1,000 queries instead of 5,000; unlike PGD it
also finds attacks on networks that hide their gradients, so it decides: the recipe with the best mean over the exits is
trained with two seeds and attacked by the standard AutoAttack on test images (`mnist_methods.py`)."""


@dataclass(frozen=True)
class Trial:
    """A network and a recipe.

    Attributes:
        why: what the trial is compared for.
        settings: fields of `TrainSettings` that differ from the preset `neo_kd` of MNIST.
    """

    why: str
    settings: dict[str, Any]


def _declared() -> dict[str, Trial]:
    """Every trial, in the order in which they run."""
    methods_page = {
        "model": "small-cnn", "method": "adversarial", "epochs": 20, "decay_at": (0.75,), "attack": "max-average",
    }  # fmt: skip
    one_cycle = {
        "method": "adversarial", "epochs": 40, "batch": 256, "lr": 0.05, "lr_schedule": "one-cycle", "warmup": 0.2,
        "decay_at": (), "nesterov": True, "ema": 0.998, "attack": "average", "step": 0.01, "steps": 40,
        "validate_every": 10,
    }  # fmt: skip
    attacked = one_cycle | {"model": "mnist-cnn"}
    clean_only = {"options": {"clean_weight": 1.0, "attacked_weight": 0.0}}
    trades = attacked | clean_only | {"trades": 6.0}
    ten_steps = {"steps": 10, "step": 0.06, "epochs": 30}
    return {
        "attacked-10": Trial("cross-entropy of clean and of attacked images, ten steps", attacked | ten_steps),
        "trades-10": Trial("TRADES 6, ten steps", trades | ten_steps),
        "max-10": Trial(
            "max-average attack, ten steps, moved images",
            attacked | ten_steps | {"attack": "max-average", "augment": "shift"},
        ),
        "grow-10": Trial(
            "an attack that grows: 3 steps, then average, then max-average; moved images",
            attacked
            | ten_steps
            | {
                "attack": "max-average",
                "augment": "shift",
                "epochs": 20,
                "short_attack_until": 0.2,
                "average_attack_until": 0.5,
            },
        ),
        "trades-10-slow": Trial("the same at learning rate 0.01", trades | ten_steps | {"lr": 0.01}),
        "shift-10": Trial("images moved by up to 2 pixels", attacked | ten_steps | {"augment": "shift"}),
        "awp-10": Trial("adversarial weight perturbation", attacked | ten_steps | {"awp": 0.005}),
        "trades-6": Trial("TRADES 6: cross-entropy of clean images, and KL to attacked ones", trades),
        "attacked": Trial("cross-entropy of clean and of attacked images", attacked),
        "small-trades-6": Trial("the network of RDI-Nets", trades | {"model": "small-cnn"}),
        "both-3": Trial("TRADES 3 beside both cross-entropies", attacked | {"trades": 3.0}),
        "max-average": Trial(
            "max-average attack in the second half", trades | {"attack": "max-average", "average_attack_until": 0.5}
        ),
        "exit-1-twice": Trial("twice the weight on exit 1", trades | {"exit_weights": (2.0, 1.0, 1.0)}),
        "large-steps": Trial("40 steps of 1/30", trades | {"step": 1 / 30}),
        "trades-3": Trial("TRADES 3", trades | {"trades": 3.0}),
        "methods-page": Trial("the schedule of the methods' page", methods_page),
        "neo-kd": Trial("NEO-KD by this schedule", attacked | {"method": "neo-kd"}),
        "small-batch": Trial("batches of 128", trades | {"batch": 128, "lr": 0.03}),
        "larger-lr": Trial("learning rate 0.1", trades | {"lr": 0.1}),
        "no-ema": Trial("without averaged weights", trades | {"ema": 0.0}),
        "smoothed": Trial("label smoothing 0.1", attacked | {"label_smoothing": 0.1}),
        "awp": Trial("adversarial weight perturbation", trades | {"awp": 0.005}),
        "short-start": Trial("3 steps in the first 15 %", trades | {"short_attack_until": 0.15}),
        "small-attacked": Trial("RDI-Nets' network, both cross-entropies", attacked | {"model": "small-cnn"}),
        "long": Trial("three times as long", trades | {"epochs": 120}),
    }


TRIALS = _declared()


COLUMNS = ("trial", "seed", "clean, % at exits", "PGD", "AutoAttack", "MACs at exits", "trained on")
TINY = {"epochs": 1, "fraction": 0.01, "steps": 1, "batch": 64}  # for a rehearsal


@dataclass(frozen=True)
class Places:
    """Directories of one call.

    Attributes:
        data: folder of the data sets.
        out: results of trials, TRIAL-SEED.json.
        runs: run directories.
        miniature: a rehearsal: every trial is tiny, and stored results of real trials do not count.
    """

    data: str
    out: Path
    runs: Path
    miniature: bool

    def result(self, name: str, seed: int) -> Path | None:
        """The stored result of a trial, or None."""
        folders = (self.out,) if self.miniature else (self.out, RESULTS / NAME)
        found = [folder / f"{name}-{seed}.json" for folder in folders]
        return next((path for path in found if path.exists()), None)


def run_trial(name: str, seed: int, places: Places, device: str, threads: int, deadline_s: float) -> None:
    """Train and judge one trial; returns early, with a checkpoint, at the deadline."""
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def should_stop() -> bool:
        return time.time() > deadline_s

    torch.set_num_threads(threads)
    keep_freed_memory()
    run = places.runs / f"{name}-{seed}"
    settings = {**TRIALS[name].settings, **(TINY if places.miniature else {}), "seed": seed}
    options = TrainOptions(device=device, threads=threads, should_stop=should_stop)
    if train_or_resume(run, "mnist", "neo_kd", settings, options, places.data) and not should_stop():
        judged = judge(run, places.data, resolve_device(device), places.miniature)
        about = {"trial": name, "seed": seed, "settings": TRIALS[name].settings, "machine": machine_name(device)}
        write_bytes(places.out / f"{name}-{seed}.json", (json.dumps(about | judged) + "\n").encode())


def _end_with_parent() -> None:
    while os.read(0, 1):  # unlike sys.stdin, without a lock that the interpreter needs at its end
        pass
    os._exit(1)


def judge(run: Path, data_dir: str, device: str, miniature: bool) -> dict[str, Any]:
    """Accuracy of every exit on selection images in percent: clean, under `PGD`, and `AUTOATTACK` if installed."""
    attacks, autoattack = PGD, AUTOATTACK
    if miniature:
        attacks = tuple(replace(one, pgd=replace(one.pgd, steps=1)) for one in PGD)
        autoattack = AutoAttackConfig(steps=1, queries=1, targets=1)
    model, settings, splits = checkpoint.load_model(run)
    model.to(device)
    data = registry.load("mnist", data_dir)
    index = evenly_spaced(splits.part("selection"), IMAGES)
    images, labels = data.batch(index, settings.model_spec().input), data.labels[index]
    clean = correct_predictions(run_exits(model, images), labels)
    robust = clean.copy()
    for k, attack in itertools.product(range(model.exits), attacks):
        attacked = attack_images(model, images, labels, index, replace(attack, exit=k + 1))
        robust[k] &= correct_predictions(run_exits(model, attacked), labels)[k]
    judged = {"clean": clean, "pgd": robust}
    if importlib.util.find_spec("pyautoattack"):
        judged["autoattack"] = under_autoattack(model, images, labels, autoattack)
    shares = {name: [round(100 * float(row.mean()), 2) for row in correct] for name, correct in judged.items()}
    return {"macs": [cost.macs for cost in exit_costs(model)], "images": len(index), **shares}


@exact_float32()
def under_autoattack(
    model: MultiExit, images: NDArray[np.float32], labels: NDArray[np.int64], config: AutoAttackConfig
) -> NDArray[np.bool_]:
    """Whether each exit withstands AutoAttack on each image, (E, N)."""
    pixels, truth = (torch.from_numpy(array).to(device_of(model)) for array in (images, labels))
    exits = [ExitClassifier(model, k) for k in range(1, model.exits + 1)]
    return np.stack([auto_attack(one, pixels, truth, EPS, config=config).robust.cpu().numpy() for one in exits])


def run_pending(arguments: argparse.Namespace, places: Places) -> None:
    """Run the chosen trials without a result, several at a time, each in its own process."""
    deadline_s = time.time() + 60 * arguments.minutes
    pending = [name for name in arguments.trial or TRIALS if places.result(name, arguments.seed) is None]
    running: dict[str, subprocess.Popen[bytes]] = {}
    while pending or running:
        while pending and len(running) < arguments.jobs and time.time() < deadline_s:
            name = pending.pop(0)
            options = ["--worker", "--trial", name, "--deadline", str(deadline_s)]
            command = [sys.executable, *sys.argv, *options]
            running[name] = subprocess.Popen(command, stdin=subprocess.PIPE)  # closes when this process is gone
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                done = places.result(name, arguments.seed)
                print(
                    name, done.read_text() if done else f"not finished (exit status {process.returncode})", flush=True
                )
        if not running and time.time() > deadline_s:
            break
        time.sleep(0.2)
    print("without a result:", [name for name in TRIALS if places.result(name, arguments.seed) is None])


def write(places: Places) -> None:
    """Write the page from every stored result; trials without one are listed too."""
    rows, machines = [], set()
    stored = {path.name: path for folder in (RESULTS / NAME, places.out) for path in sorted(folder.glob("*.json"))}
    results = [json.loads(path.read_text()) for path in stored.values()]
    for name in TRIALS:
        own = [result for result in results if result["trial"] == name]
        rows += [[name, result["seed"], *_cells(result), result["machine"]] for result in own]
        rows += [] if own else [[name, "-", "not run", "", "", "", ""]]
        machines |= {result["machine"] for result in own}
    changes = [[name, trial.why, _differences(trial)] for name, trial in TRIALS.items()]
    parts = [
        ABOUT,
        table(COLUMNS, rows),
        "**Recipes**: settings of `mexit train --data mnist --preset neo_kd` that differ from the preset.",
        table(["trial", "compared for", "settings"], changes),
    ]
    write_page(NAME, hardware_name(machines), "Recipes for MNIST, judged on the selection split", parts)


def _cells(result: dict[str, Any]) -> list[str]:
    judged = [result.get(key) for key in ("clean", "pgd", "autoattack")]
    shares = [" / ".join(f"{value:.1f}" for value in row) if row else "not installed" for row in judged]
    return [*shares, " / ".join(short_macs(value) for value in result["macs"])]


def _differences(trial: Trial) -> str:
    return ", ".join(f"{name} {value}" for name, value in trial.settings.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trial", nargs="*", choices=list(TRIALS), help="trials to run, default all, in their order")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop, with checkpoints, after these minutes")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each trial")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--data", default=os.environ.get("MEXIT_DATA", "data"), help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=RESULTS / NAME, help="folder of the results")
    parser.add_argument("--runs", type=Path, default=Path("runs/mnist-recipes"), help="folder of the run directories")
    parser.add_argument("--page", action="store_true", help="write the page and run nothing")
    parser.add_argument("--miniature", action="store_true", help="rehearse with tiny trials; name --out and --runs too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=math.inf, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    places = Places(arguments.data, arguments.out, arguments.runs, arguments.miniature)
    if arguments.page:
        write(places)
    elif arguments.worker:
        (name,) = arguments.trial
        run_trial(name, arguments.seed, places, arguments.device, arguments.threads, arguments.deadline)
    else:
        run_pending(arguments, places)


if __name__ == "__main__":
    main()
