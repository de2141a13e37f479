"""Accuracy of every exit of a network, clean and under attack. float32 throughout."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from mexit.core.manifest import InputSpec
from mexit.data.dataset import DataSet
from mexit.train.attacks.objective import Attack, craft, craft_each_exit, keep_worst
from mexit.train.models.multi_exit import MultiExit
from mexit.train.randomness import Draw

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
                draw=Draw(seed, 0),
                index=torch.from_numpy(part),
            )
            images = attacked.numpy()
        yield images, labels, part


def exit_logits(
    model: MultiExit, batches: Attacked, progress: Callable[[int], None] | None = None
) -> NDArray[np.float32]:
    """Logits of every exit, (E, N, C)."""
    found = []
    model.eval()
    for images, _, _ in batches:
        with torch.no_grad():
            found.append(model(torch.from_numpy(images)).numpy())
        if progress is not None:
            progress(len(images))
    return np.concatenate(found, axis=1)


def max_average_and_transfer(
    model: MultiExit,
    data: DataSet,
    index: NDArray[np.int64],
    spec: InputSpec,
    attack: Attack,
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """One single attack an exit, judged twice.

    Returns:
        Right answers (E, N) under max-average, and (E attacked, E answering, N) under each single attack: the
        exit-by-exit transfer matrix.
    """
    model.eval()
    chosen, transfer = [], []
    for part in np.array_split(index, range(BATCH, len(index), BATCH)):
        images = torch.from_numpy(data.batch(part, spec))
        labels, place = torch.from_numpy(data.labels[part]), torch.from_numpy(part)
        candidates = craft_each_exit(model, images, labels, attack, draw=Draw(seed, 0), index=place)
        with torch.no_grad():
            worst = keep_worst(model, candidates, labels)
            chosen.append((model(worst).argmax(dim=-1) == labels).numpy())
            transfer.append(torch.stack([model(one).argmax(dim=-1) == labels for one in candidates]).numpy())
        if progress is not None:
            progress(len(part))
    return np.concatenate(chosen, axis=1), np.concatenate(transfer, axis=2)


def right(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which exits answer which samples rightly: logits (E, N, C), labels (N,) to (E, N). NaN is wrong."""
    answers: NDArray[np.bool_] = logits.argmax(axis=-1) == labels
    return answers & ~np.isnan(logits).any(axis=-1)
