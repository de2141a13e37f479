"""How the training methods compare on MNIST: per exit, under PGD-50, under AutoAttack, and as deployed.

    MEXIT_DATA=DIR python benchmarks/mnist_methods.py adversarial neo-kd

Trains what is not trained yet (runs/mnist-methods/METHOD-SEED, continued where they stopped; one command restarts
all), and writes the page from every run that is finished. One schedule for all methods, declared here: NEO-KD's
for MNIST (SGD, lr 0.01, batch 128, max-average PGD-7, eps 0.3) with 20 epochs instead of 150, lr divided by 10
after 15, and the last weights, so that nothing is chosen by looking.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mexit.flows.train import train

RUNS = Path("runs/mnist-methods")
SCHEDULE = {"epochs": 20, "decay_at": (0.75,), "attack": "max-average", "keep": "last"}


def run_of(method: str, seed: int, threads: int) -> Path:
    """The finished run of a method and a seed."""
    out = RUNS / f"{method}-{seed}"
    if not (out / "weights.safetensors").exists():
        given = {**SCHEDULE, "model": "small-cnn", "method": method, "seed": seed}
        resume = (out / "settings.json").exists()
        train(data="mnist", preset="neo_kd", given=given, out=out, resume=resume, threads=threads)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    for method in chosen.methods:
        run_of(method, chosen.seed, chosen.threads)


if __name__ == "__main__":
    main()
