"""How much faster a training step is by the project's recipe than by plain float32 code.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/training_speed.py

One step: PGD-7 on a batch of 128 images, then cross-entropy of every exit on the clean and the attacked ones, and
SGD. "plain" is written out here: float32, eager, the default memory layout, every exit run in every pass, and
torch's default allocator; "recipe" is what `mexit train` does. Each runs in a process of its own, because the
allocator's settings are the whole process's; the two take turns, one step each, so that a busy machine slows both.
Seconds are processor time of the step, all threads together.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

BATCH, CLASSES, EPS, SIZE, STEPS = 128, 10, 8 / 255, 2 / 255, 7
TARGETS = {"small-cnn": 4.0, "resnet38": 3.5, "msdnet-cifar10": 2.5}
ATTACKS = ("average", "max-average")


def plain_step(name: str, attack: str) -> Callable[[], None]:
    """RDI-Nets' procedure, as one would write it down."""
    import torch
    import torch.nn.functional as F

    from mexit.models import build_model, model_spec

    torch.manual_seed(0)
    model = build_model(name, CLASSES)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    images, labels = torch.rand(BATCH, *model_spec(name).input_shape), torch.randint(0, CLASSES, (BATCH,))

    def losses(logits):
        return torch.stack([F.cross_entropy(exit_logits, labels, reduction="none") for exit_logits in logits])

    def pgd(climbed):
        attacked = (images + (2 * torch.rand_like(images) - 1) * EPS).clamp(0, 1)
        for _ in range(STEPS):
            attacked = attacked.detach().requires_grad_()
            loss = losses(model(attacked))[climbed].mean(dim=0).sum()
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


def recipe_step(name: str, attack: str) -> Callable[[], None]:
    """What `mexit train --method adversarial` does with a batch."""
    import torch

    from mexit.attacks.rng import CounterRNG
    from mexit.models import build_model, model_spec
    from mexit.train import precision
    from mexit.train.config import TrainSettings
    from mexit.train.methods import build_method
    from mexit.train.methods.base import Adaptation, Batch
    from mexit.train.train_step import Step

    precision.keep_freed_memory()
    torch.manual_seed(0)
    settings = TrainSettings(
        model=name, method="adversarial", attack=attack, eps=EPS, step=SIZE, steps=STEPS, batch=BATCH
    )
    how = precision.choose("auto", "cpu", name)
    model = how.place(build_model(name, CLASSES))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    objective = build_method("adversarial", {})
    taker = Step(model, objective, optimiser, settings, None, how.attack_copy(model))
    images = how.images(torch.rand(BATCH, *model_spec(name).input_shape))
    labels = torch.randint(0, CLASSES, (BATCH,))
    draw, index, goal = CounterRNG(0, 0), torch.arange(BATCH), settings.training_attack()
    adaptation = Adaptation(model, settings.lr, lambda: (images, labels), how.autocast)

    def step():
        taker.take(Batch(model, images, labels, index, goal, draw, how.autocast), adaptation, 0.0, 0)

    return step


def serve(kind: str, name: str, attack: str, threads: int) -> None:
    """In a process of its own: answer each line on standard input with the seconds of one step."""
    import torch

    torch.set_num_threads(threads)
    step = {"plain": plain_step, "recipe": recipe_step}[kind](name, attack)
    for _ in sys.stdin:
        begin = time.process_time(), time.perf_counter()
        step()
        print(time.process_time() - begin[0], time.perf_counter() - begin[1], flush=True)


def compare(name: str, attack: str, threads: int, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """(repeats, 2) processor seconds of plain and recipe, and the same of the clock."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--serve", kind, name, attack, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for kind in ("plain", "recipe")
    ]
    found = []
    for _ in range(repeats + 1):  # the first of each warms up
        pair = []
        for worker in workers:
            worker.stdin.write("\n")
            worker.stdin.flush()
            pair.append([float(word) for word in worker.stdout.readline().split()])
        found.append(pair)
    for worker in workers:
        worker.communicate()
    seconds = np.array(found[1:])
    return seconds[:, :, 0], seconds[:, :, 1]


def row(name: str, attack: str, threads: int, repeats: int) -> list[object]:
    """Of the table."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", nargs=4, metavar=("KIND", "NETWORK", "ATTACK", "THREADS"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--networks", nargs="+", default=list(TARGETS))
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS))
    chosen = parser.parse_args()
    if chosen.serve:
        kind, name, attack, threads = chosen.serve
        serve(kind, name, attack, int(threads))
        return
    from page import table, write_page

    before = os.getloadavg()[0]
    rows = [
        row(name, attack, threads, chosen.repeats)
        for threads in chosen.threads
        for name in chosen.networks
        for attack in chosen.attacks
    ]
    columns = [
        "network", "attack", "threads", "plain", "recipe", "ratio (spread)", "ratio by the clock (spread)", "n",
        "target", "met",
    ]  # fmt: skip
    import torch

    from mexit.core.resource_limits import read_limits

    cores = read_limits().threads
    write_page(
        "training_speed",
        f"{cores}-core-cpu",
        f"One PGD-{STEPS} training step on {BATCH} images, plain float32 against the recipe",
        [
            table(columns, rows),
            "Seconds are the median processor time of a step, all threads together. Plain and recipe took turns, "
            "step by step; a ratio is that of one pair, and the table gives the median pair and the extremes. "
            "Random images and labels: the arithmetic is the same as on real ones.",
            f"torch {torch.__version__}. Other work ran on these cores: the load average was {before:.1f} at the "
            f"start and {os.getloadavg()[0]:.1f} at the end, of which up to one a thread is this program's. "
            "A busy neighbour takes caches and memory bandwidth, hence the spread.",
        ],
    )


if __name__ == "__main__":
    main()
