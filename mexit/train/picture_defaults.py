"""Settings of a run on a folder of pictures that follow from the pictures, the machine and the length of the run."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mexit.data.dataset import DataSet, evenly_spaced, split_batches
from mexit.data.picture_sample import PictureSample
from mexit.models import MultiExit, model_spec
from mexit.models.exit_costs import exit_costs
from mexit.train.config import TrainSettings
from mexit.train.precision import Precision

# Networks from small to large: the channels of the last stage, and the training images below which they are not chosen.
NETWORKS = {
    "wide-cnn-10m": (96, 0), "wide-cnn-20m": (128, 0), "wide-cnn-40m": (192, 3000), "wide-cnn": (256, 30_000),
}  # fmt: skip
BASIC = "wide-cnn-20m"
# Sides of square images, in pixels. Below 32 pixels photographs lose their content.
SIDES = (16, 24, 32, 48, 64, 96, 128)
SMALLEST_SIDE = 32
# Passes over the training split: enough, too few, more than it takes. For the same time, more passes at a smaller size
# are better until there are enough (benchmarks/results/folder_defaults_*).
PASSES, FEW_PASSES, MOST_PASSES = 120, 40, 300
LR_WITHOUT_NORMS = 0.01
_SPEED_BATCH, _SPEED_STEPS = 64, 12
_USED_FOR_STEPS = 0.8  # of the time; the rest goes into validation, augmentation and loading
_MEASURED_PICTURES = 2000
_LEAST_STD = 0.02
_BASIC_MINUTES = 10.0


@dataclass(frozen=True)
class Fit:
    """Settings that fit the pictures, and the expected number of passes over the training split in their time."""

    settings: TrainSettings
    passes: float


def fit_to_pictures(
    settings: TrainSettings,
    given: Collection[str],
    pictures: PictureSample,
    images: int,
    classes: int,
    speed: float,
) -> Fit:
    """Choose channels, size, network, learning rate and length where they are not given.

    The size is the largest one, up to that of the pictures, at which `wide-cnn-20m` passes `PASSES` times over the
    training split within the time. The network is the widest one that does so at that size and that suits the number
    of images and classes. A run in which it would pass more than `MOST_PASSES` times is shortened.

    Args:
        settings: settings of the run.
        given: names of the settings that the user gave.
        pictures: sizes and colours of the pictures.
        images: number of training images.
        classes: C.
        speed: MACs of training steps per second, see `measure_speed`.
    """
    affordable = speed * _USED_FOR_STEPS * 60 * (settings.minutes or _BASIC_MINUTES) / images

    def passes(candidate: TrainSettings) -> float:
        return affordable / training_macs(candidate, classes)

    def choose(candidates: list[TrainSettings]) -> TrainSettings:
        """The last candidate that passes often enough, else the first."""
        return next((one for one in reversed(candidates) if passes(one) >= PASSES), candidates[0])

    if "model" in given and not _fits_any_pictures(settings):
        return Fit(settings, passes(settings))
    if "channels" not in given:
        settings = replace(settings, channels=1 if pictures.grey else 3)
    if "size" not in given:
        basic = settings if "model" in given else replace(settings, model=BASIC)
        settings = choose([replace(basic, size=(side, side)) for side in _sides(pictures.size)])
    if "model" not in given:
        settings = choose([replace(settings, model=name) for name in _networks(images, classes)])
    if "lr" not in given and not _has_batch_norm(settings, classes):
        settings = replace(settings, lr=LR_WITHOUT_NORMS)
    if "minutes" not in given and settings.minutes and passes(settings) > MOST_PASSES:
        settings = replace(settings, minutes=math.ceil(settings.minutes * MOST_PASSES / passes(settings)))
    return Fit(settings, passes(settings))


def training_macs(settings: TrainSettings, classes: int) -> float:
    """MACs of one training image: three forward passes for a step, two more for each step of the attack."""
    macs = exit_costs(network_shape(settings, classes))[-1].macs
    if settings.attack == "none":
        return 3.0 * macs
    attacks = settings.model_spec().exits if settings.attack == "max-average" else 1
    return macs * (6.0 + 2.0 * settings.steps * settings.restarts * attacks)


def network_shape(settings: TrainSettings, classes: int) -> MultiExit:
    """The network of a run without memory for its weights."""
    with torch.device("meta"):
        return settings.model_spec().build(classes)


def measure_speed(precision: Precision) -> float:
    """MACs of training steps per second on a device: the fastest of a few steps of a small network."""
    spec = model_spec(BASIC)
    network = precision.prepare(spec.build(10)).train()
    images = precision.to_device(torch.zeros(_SPEED_BATCH, *spec.input_shape))
    fastest = math.inf
    for _ in range(_SPEED_STEPS):
        start_s = time.perf_counter()
        with precision.autocast():
            logits = network(images)
        network.zero_grad()
        logits.float().square().mean().backward()
        float(logits.detach().sum())  # waits for the device
        fastest = min(fastest, time.perf_counter() - start_s)
    return 3 * exit_costs(spec.build(10))[-1].macs * _SPEED_BATCH / fastest


def measure_normalisation(data: DataSet, index: NDArray[np.int64], settings: TrainSettings) -> TrainSettings:
    """Set mean and standard deviation of the pixels of each channel, from at most 2,000 pictures, evenly spaced.

    Args:
        data: data set.
        index: positions of the training images, (n,).
        settings: settings with the network and its input.
    """
    spec = settings.model_spec()
    if not _fits_any_pictures(settings):
        return settings
    sums, squares, count = np.zeros(spec.input.channels), np.zeros(spec.input.channels), 0
    for part in split_batches(evenly_spaced(index, _MEASURED_PICTURES), _SPEED_BATCH):
        pixels = data.batch(part, spec.input).astype(np.float64)
        sums += pixels.sum(axis=(0, 2, 3))
        squares += np.square(pixels).sum(axis=(0, 2, 3))
        count += pixels.size // spec.input.channels
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - np.square(mean), _LEAST_STD**2))
    return replace(settings, mean=tuple(mean.round(4).tolist()), std=tuple(std.round(4).tolist()))


def _fits_any_pictures(settings: TrainSettings) -> bool:
    """Whether size and normalisation may follow the pictures; a pretrained network has its own."""
    spec = settings.model_spec()
    return spec.any_input and spec.initial is None


def _networks(images: int, classes: int) -> list[str]:
    """Networks wide enough for the classes, and not wider than the number of training images can fill.

    Logits of C classes from fewer than C features are linearly dependent. More pictures support more weights.
    """
    names = list(NETWORKS)
    first = next((k for k, (channels, _) in enumerate(NETWORKS.values()) if channels >= classes), len(names) - 1)
    last = max(k for k, (_, least) in enumerate(NETWORKS.values()) if images >= least)
    return names[first : max(first, last) + 1]


def _sides(size: tuple[int, int]) -> list[int]:
    """Sides of square images from the smallest useful one up to about the size (H, W) of the pictures."""
    own = math.sqrt(size[0] * size[1])
    nearest = min(SIDES, key=lambda side: abs(math.log(side / own)))
    return [side for side in SIDES if min(nearest, SMALLEST_SIDE) <= side <= nearest]


def _has_batch_norm(settings: TrainSettings, classes: int) -> bool:
    return any(isinstance(layer, nn.BatchNorm2d) for layer in network_shape(settings, classes).modules())
