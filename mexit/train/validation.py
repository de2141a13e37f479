"""Accuracy of every exit of a network, on clean images and under attack, in float32.

Arrays are numpy; the network computes on its own device.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from mexit.attacks.pgd import Attack, craft
from mexit.attacks.rng import CounterRNG
from mexit.core.manifest import InputSpec
from mexit.data.dataset import DataSet, split_batches
from mexit.models.device import exact_float32, tensors_for
from mexit.models.multi_exit import MultiExit

BATCH = 256
AttackedBatches = Iterator[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]]


def attacked_batches(
    model: MultiExit,
    data: DataSet,
    index: NDArray[np.int64],
    spec: InputSpec,
    attack: Attack | None,
    *,
    seed: int = 0,
    batch: int = BATCH,
) -> AttackedBatches:
    """Attack the images of a data set, batch by batch.

    Args:
        model: network to attack; it is set to eval mode.
        data: data set.
        index: positions in the data set, (N,).
        spec: input specification that the images are prepared for.
        attack: attack; None yields the clean images.
        seed: seed of the attack's random numbers.
        batch: images per batch.

    Yields:
        Images (B, C, H, W) float32 in [0, 1], labels (B,), positions (B,).
    """
    model.eval()
    for part in split_batches(index, batch):
        images, labels = data.batch(part, spec), data.labels[part]
        if attack is not None:
            images = attack_images(model, images, labels, part, attack, seed=seed)
        yield images, labels, part


@exact_float32()
def attack_images(
    model: MultiExit,
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    index: NDArray[np.int64],
    attack: Attack,
    *,
    seed: int = 0,
) -> NDArray[np.float32]:
    """`craft` on numpy arrays: images (B, C, H, W), labels (B,) and positions in the data set (B,) to (B, C, H, W)."""
    pixels, truth, positions = tensors_for(model, images, labels, index)
    attacked = craft(model, pixels, truth, attack, rng=CounterRNG(seed, 0), index=positions)
    return np.asarray(attacked.cpu().numpy())


def exit_logits(model: MultiExit, batches: AttackedBatches) -> NDArray[np.float32]:
    """Logits of every exit on the batches, (E, N, C)."""
    return np.concatenate([run_exits(model, images) for images, _, _ in batches], axis=1)


@exact_float32()
def run_exits(model: MultiExit, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits of every exit on one batch, in eval mode: (B, C, H, W) to (E, B, C)."""
    with torch.no_grad():
        logits: NDArray[np.float32] = model.eval()(*tensors_for(model, images)).cpu().numpy()
    return logits


def correct_predictions(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each exit classifies each sample correctly: logits (E, N, C), labels (N,) to (E, N); False for NaN."""
    correct: NDArray[np.bool_] = logits.argmax(axis=-1) == labels
    return correct & ~np.isnan(logits).any(axis=-1)
