"""Compare the duration of a training step of mexit with that of plain float32 code.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/training_speed.py

One step: PGD-7 on a batch of 128 images, then cross-entropy of every exit on the clean and the attacked images, and
SGD. "plain" is written out here: float32, eager, the default memory format, every exit in every forward pass, and
torch's default allocator; "mexit" is the step of `mexit train`. Each runs in its own process, because the settings of
the allocator apply to a process; the two alternate step by step, so that other load slows both. Seconds are the
processor time of the step, summed over threads.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from page import table, write_page

from mexit.attacks.rng import CounterRNG
from mexit.core.resource_limits import read_limits
from mexit.models import build_model, model_spec
from mexit.train import precision
from mexit.train.config import TrainSettings
from mexit.train.methods import build_method
from mexit.train.methods.base import Adaptation, Batch, StepInfo
from mexit.train.train_step import TrainStep

BATCH, CLASSES, EPS, SIZE, STEPS = 128, 10, 8 / 255, 2 / 255, 7
TARGETS = {"small-cnn": 4.0, "resnet38": 3.5, "msdnet-cifar10": 2.5}
ATTACKS = ("average", "max-average")


def plain_step(name: str, attack: str) -> Callable[[], None]:
    """A step of RDI-Nets' procedure in plain torch code."""
    torch.manual_seed(0)
    model = build_model(name, CLASSES)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    images, labels = torch.rand(BATCH, *model_spec(name).input_shape), torch.randint(0, CLASSES, (BATCH,))

    def losses(logits):
        return torch.stack([F.cross_entropy(exit_logits, labels, reduction="none") for exit_logits in logits])

    def pgd(exits):
        attacked = (images + (2 * torch.rand_like(images) - 1) * EPS).clamp(0, 1)
        for _ in range(STEPS):
            attacked = attacked.detach().requires_grad_()
            loss = losses(model(attacked))[exits].mean(dim=0).sum()
            (gradient,) = torch.autograd.grad(loss, attacked)
            attacked = attacked.detach() + SIZE * gradient.sign()
            attacked = torch.min(torch.max(attacked, images - EPS), images + EPS).clamp(0, 1)
        return attacked.detach()

    def craft():
        if attack == "average":
            return pgd(slice(None))
        candidates = torch.stack([pgd(slice(k, k + 1)) for k in range(model.exits)])
        with torch.no_grad():
            mean_losses = torch.stack([losses(model(candidate)).mean(dim=0) for candidate in candidates])
        return candidates[mean_losses.argmax(dim=0), torch.arange(BATCH)]

    def step():
        model.eval()
        attacked = craft()
        model.train()
        loss = losses(model(images)).mean(dim=1).sum() + losses(model(attacked)).mean(dim=1).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def mexit_step(name: str, attack: str) -> Callable[[], None]:
    """A step of `mexit train --method adversarial`."""
    precision.keep_freed_memory()
    torch.manual_seed(0)
    settings = TrainSettings(
        model=name, method="adversarial", attack=attack, eps=EPS, step=SIZE, steps=STEPS, batch=BATCH
    )
    selected = precision.select_precision("auto", "cpu")
    model = selected.prepare(build_model(name, CLASSES))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    method = build_method("adversarial", {})
    train_step = TrainStep(model, method, optimiser, settings, attack_copy=selected.attack_copy(model))
    images = selected.to_device(torch.rand(BATCH, *model_spec(name).input_shape))
    labels = torch.randint(0, CLASSES, (BATCH,))
    index, pgd = torch.arange(BATCH), settings.training_attack()
    batch = Batch(model, images, labels, index, pgd, CounterRNG(0, 0), selected.autocast)
    adaptation = Adaptation(model, settings.lr, lambda: (images, labels), selected.autocast)

    def step():
        train_step.run(batch, adaptation, StepInfo())

    return step


def serve(kind: str, name: str, attack: str, threads: int) -> None:
    """Run one step per line of standard input, and print its processor and wall-clock seconds."""
    torch.set_num_threads(threads)
    step = {"plain": plain_step, "mexit": mexit_step}[kind](name, attack)
    for _ in sys.stdin:
        begin = time.process_time(), time.perf_counter()
        step()
        print(time.process_time() - begin[0], time.perf_counter() - begin[1], flush=True)


def compare(name: str, attack: str, threads: int, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of plain and mexit, (repeats, 2): of the processor, and of the wall clock."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--serve", kind, name, attack, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for kind in ("plain", "mexit")
    ]
    steps = []
    for _ in range(repeats + 1):  # the first step is a warm-up
        pair = []
        for worker in workers:
            worker.stdin.write("\n")
            worker.stdin.flush()
            pair.append([float(word) for word in worker.stdout.readline().split()])
        steps.append(pair)
    for worker in workers:
        worker.communicate()
    seconds = np.array(steps[1:])
    return seconds[:, :, 0], seconds[:, :, 1]


def row(name: str, attack: str, threads: int, repeats: int) -> list[object]:
    """One row of the result table."""
    used, clock = compare(name, attack, threads, repeats)
    ratios, walls = used[:, 0] / used[:, 1], clock[:, 0] / clock[:, 1]
    plain, fast = np.median(used, axis=0)
    target = f"{TARGETS[name]:g}"
    return [
        name, attack, threads, f"{plain:.3f} s", f"{fast:.3f} s",
        f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})",
        f"{np.median(walls):.2f} ({walls.min():.2f} to {walls.max():.2f})", repeats, target,
        "yes" if np.median(ratios) >= TARGETS[name] else "no",
    ]  # fmt: skip


def main() -> None:
    """Measure and write the page, or run the steps of one worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", nargs=4, metavar=("KIND", "NETWORK", "ATTACK", "THREADS"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--networks", nargs="+", default=list(TARGETS))
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS))
    arguments = parser.parse_args()
    if arguments.serve:
        kind, name, attack, threads = arguments.serve
        serve(kind, name, attack, int(threads))
        return
    before = os.getloadavg()[0]
    rows = [
        row(name, attack, threads, arguments.repeats)
        for threads in arguments.threads
        for name in arguments.networks
        for attack in arguments.attacks
    ]
    columns = [
        "network", "attack", "threads", "plain", "mexit", "ratio (spread)", "ratio by the clock (spread)", "n",
        "target", "met",
    ]  # fmt: skip
    cores = read_limits().threads
    write_page(
        "training_speed",
        f"{cores}-core-cpu",
        f"One PGD-{STEPS} training step on {BATCH} images, plain float32 against mexit",
        [
            table(columns, rows),
            "Seconds are the median processor time of a step, summed over threads. Plain and mexit alternated "
            "step by step; a ratio is that of one pair, and the table gives the median and the extremes. "
            "Random images and labels: the arithmetic is the same as on real ones.",
            f"torch {torch.__version__}. Other work ran on these cores: the load average was {before:.1f} at the "
            f"start and {os.getloadavg()[0]:.1f} at the end, of which up to one a thread is this program's. "
            "A busy neighbour takes caches and memory bandwidth, hence the spread.",
        ],
    )


if __name__ == "__main__":
    main()
