"""Outputs of a batch from given logits, for tests of the training methods."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mexit.attacks.rng import CounterRNG
from mexit.models import MultiExit, build_model
from mexit.train.methods import Outputs
from mexit.train.methods.base import Batch, StepInfo


@cache
def _network() -> MultiExit:
    with torch.random.fork_rng():
        return build_model("digits-cnn", 10)


def make_outputs(
    clean: Tensor,
    attacked: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    index: Tensor | None = None,
    images: Tensor | None = None,
    attacked_images: Tensor | None = None,
    epoch: int = 0,
    step: StepInfo | None = None,
) -> Outputs:
    """The outputs of one step.

    Args:
        clean: logits (E, B, C).
        attacked: logits on one attacked version (E, B, C), or on several (V, E, B, C).
        labels: (B,); default 0, 1, ... C-1, 0, ...
        index: positions in the data set, (B,); default 0, 1, ...
        images, attacked_images: (B, C, H, W) and (V, B, C, H, W); default black.
        epoch: of the random numbers; the seed is 0.
        step: default the first step of a run.
    """
    rows, classes = clean.shape[1:]
    index = torch.arange(rows) if index is None else index
    labels = torch.arange(rows) % classes if labels is None else labels
    images = torch.zeros(rows, 1, 1, 1) if images is None else images
    variants = attacked[None] if attacked is not None and attacked.ndim == 3 else attacked
    if variants is not None and attacked_images is None:
        attacked_images = images.expand(len(variants), *images.shape)
    batch = Batch(_network(), images, labels, index, None, CounterRNG(0, epoch))
    return Outputs(batch, clean, variants, attacked_images, step or StepInfo())
