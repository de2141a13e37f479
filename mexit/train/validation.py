"""Accuracy of every exit of a network, clean and under attack. float32 throughout."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from mexit.attacks.multi_exit_attack import Attack, craft, craft_each_exit, keep_worst, start_noise
from mexit.attacks.pgd import PGDConfig, noise, pgd
from mexit.attacks.rng import CounterRNG
from mexit.core.manifest import InputSpec
from mexit.data.dataset import DataSet
from mexit.models.multi_exit import MultiExit

BATCH = 256
Attacked = Iterator[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]]


def attacked_batches(
    model: MultiExit,
    data: DataSet,
    index: NDArray[np.int64],
    spec: InputSpec,
    attack: Attack | None,
    *,
    seed: int = 0,
    batch: int = BATCH,
) -> Attacked:
    """Images as the network or an exported bundle gets them: (B, C, H, W) float32, labels (B,), places (B,).

    `attack` None yields the images as they are.
    """
    model.eval()
    for part in np.array_split(index, range(batch, len(index), batch)):
        images, labels = data.batch(part, spec), data.labels[part]
        if attack is not None:
            attacked = craft(
                model,
                torch.from_numpy(images),
                torch.from_numpy(labels),
                attack,
                draw=CounterRNG(seed, 0),
                index=torch.from_numpy(part),
            )
            images = attacked.numpy()
        yield images, labels, part


def exit_logits(model: MultiExit, batches: Attacked) -> NDArray[np.float32]:
    """Logits of every exit, (E, N, C)."""
    return np.concatenate([run_exits(model, images) for images, _, _ in batches], axis=1)


def run_exits(model: MultiExit, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits of every exit for one batch: (B, C, H, W) to (E, B, C)."""
    with torch.no_grad():
        logits: NDArray[np.float32] = model.eval()(torch.from_numpy(images)).numpy()
    return logits


def attack_suite(
    model: MultiExit,
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    index: NDArray[np.int64],
    steps: PGDConfig,
    *,
    seed: int = 0,
) -> dict[str, NDArray[np.float32]]:
    """One batch under every attack of the papers: `average`, `max-average` and `exit 1` ... `exit E`.

    Max-average picks from the single attacks, so those come for free; judged exit by exit they are the transfer
    matrix.
    """
    pixels, truth, place = torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(index)
    draw = CounterRNG(seed, 0)
    average = craft(model, pixels, truth, Attack("average", steps), draw=draw, index=place)
    singles = craft_each_exit(model, pixels, truth, Attack("single", steps), draw=draw, index=place)
    suite = {"average": average, "max-average": keep_worst(model, singles, truth)}
    suite |= {f"exit {k}": attacked for k, attacked in enumerate(singles, start=1)}
    return {name: attacked.numpy() for name, attacked in suite.items()}


def noisy(
    images: NDArray[np.float32], index: NDArray[np.int64], steps: PGDConfig, *, seed: int = 0
) -> NDArray[np.float32]:
    """Random noise as large as the attack: images (B, C, H, W), places (B,)."""
    pixels, size = torch.from_numpy(images), noise(steps.eps, steps.norm)
    start = start_noise(CounterRNG(seed, 0), "noise", torch.from_numpy(index), pixels, size)
    noised: NDArray[np.float32] = pgd(pixels, size, torch.zeros_like, start).numpy()  # takes no step, so no loss
    return noised


def right(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which exits answer which samples rightly: logits (E, N, C), labels (N,) to (E, N). NaN is wrong."""
    answers: NDArray[np.bool_] = logits.argmax(axis=-1) == labels
    return answers & ~np.isnan(logits).any(axis=-1)
