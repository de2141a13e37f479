"""The features that the classifiers of a frozen network read, computed in one pass over the images and kept in memory.

The classifier of an exit is the last linear layer of its head. Everything before it is frozen, so its input is a
function of the image and is computed once.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mexit.data.prepared_images import cache_bytes
from mexit.errors import UsageError
from mexit.models.device import device_of, exact_float32
from mexit.models.multi_exit import MultiExit, Stage

_BYTES = 4  # of a float32


@dataclass(frozen=True)
class CachedFeatures:
    """The input of the classifier of every exit, for N images.

    Attributes:
        exits: E tensors (N, D_k) float32 on the CPU.
        labels: (N,) int64.
    """

    exits: tuple[Tensor, ...]
    labels: Tensor


def classifiers(model: MultiExit) -> tuple[nn.Linear, ...]:
    """The classifier of every exit, E linear layers with C outputs.

    Raises:
        UsageError: a head has no linear layer with C outputs.
    """
    found = []
    for k, stage in enumerate(model.stages, start=1):
        layers = [layer for layer in cast("Stage", stage).head.modules() if isinstance(layer, nn.Linear)]
        if not layers or layers[-1].out_features != model.classes:
            raise UsageError(f"--freeze trains the last linear layer of each head, and the head of exit {k} has none")
        found.append(layers[-1])
    return tuple(found)


def most_images(model: MultiExit) -> int:
    """The number of images whose features fit into the memory that a cache may take."""
    return cache_bytes() // (_BYTES * sum(layer.in_features for layer in classifiers(model)))


def compute_features(
    model: MultiExit, batches: Iterable[NDArray[np.float32]], labels: NDArray[np.int64]
) -> CachedFeatures:
    """Run a network once over N images, in float32.

    Args:
        model: network; it is in eval mode afterwards.
        batches: images (B, C, H, W) float32 in [0, 1], N in all.
        labels: their classes, (N,).

    Raises:
        UsageError: the classifier of a head does not read one vector per image, or its output is not that of the head.
    """
    model.eval()
    layers = classifiers(model)
    features = [torch.empty(len(labels), layer.in_features) for layer in layers]
    done = 0
    for images in batches:
        pixels = torch.from_numpy(images).to(device_of(model))
        for k, values in enumerate(_inputs(model, layers, pixels)):
            features[k][done : done + len(images)] = values
        done += len(images)
    return CachedFeatures(tuple(features), torch.from_numpy(labels))


@exact_float32()
@torch.no_grad()
def _inputs(model: MultiExit, layers: tuple[nn.Linear, ...], images: Tensor) -> list[Tensor]:
    """The inputs of the classifiers on one batch, E tensors (B, D_k)."""
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def record(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[id(layer)], outputs[id(layer)] = arguments[0], output

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(record))
        logits = model(images)
    for k, layer in enumerate(layers):
        is_vector = inputs[id(layer)].shape == (len(images), layer.in_features)
        if not (is_vector and torch.equal(outputs[id(layer)], logits[k])):
            raise UsageError(
                f"--freeze needs heads whose last operation is a linear layer on one vector per image; that of exit "
                f"{k + 1} ends in another operation"
            )
    return [inputs[id(layer)] for layer in layers]
