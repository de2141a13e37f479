"""Accuracy of every exit of a network, clean and under attack. float32 throughout."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from mexit.attacks.multi_exit_attack import Attack, craft
from mexit.attacks.rng import CounterRNG
from mexit.core.batches import split_batches
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
    for part in split_batches(index, batch):
        images, labels = data.batch(part, spec), data.labels[part]
        if attack is not None:
            attacked = craft(
                model,
                torch.from_numpy(images),
                torch.from_numpy(labels),
                attack,
                rng=CounterRNG(seed, 0),
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


def right(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which exits answer which samples rightly: logits (E, N, C), labels (N,) to (E, N). NaN is wrong."""
    answers: NDArray[np.bool_] = logits.argmax(axis=-1) == labels
    return answers & ~np.isnan(logits).any(axis=-1)
