"""What a training run does with a folder of pictures before its first step: choose settings, and read the pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.progress import Progress
from mexit.data.dataset import DataSet, split_batches
from mexit.data.prepared_images import fits_in_memory, with_prepared
from mexit.data.registry import is_folder
from mexit.data.splits import Splits
from mexit.errors import requires_extra

with requires_extra("train", "Training a network"):
    from mexit.data.picture_sample import sample_pictures
    from mexit.train.config import TrainSettings
    from mexit.train.dataloader import load_batches, worker_count
    from mexit.train.picture_defaults import (
        BASIC,
        FEW_PASSES,
        fit_to_pictures,
        measure_normalisation,
        measure_speed,
        network_shape,
    )
    from mexit.train.precision import select_precision

_BATCH = 64


def check_network(settings: TrainSettings, given: Mapping[str, Any], classes: int) -> None:
    """Check the network, and for a folder its input, before the pictures are read, which may take minutes.

    Args:
        settings: resolved settings.
        given: settings that the user gave; without a network, one that a folder may get stands for it.
        classes: C.

    Raises:
        UsageError: the network is unknown, or takes no images of this size and these channels.
    """
    folder = is_folder(settings.data)
    if folder and given.get("model") is None:
        settings = replace(settings, model=BASIC)
    if settings.model_spec().initial is None and folder:  # a pretrained network reads its weights when it is built
        network_shape(settings, classes)


def fit_settings(
    settings: TrainSettings, given: Mapping[str, Any], data: DataSet, splits: Splits, device: str, progress: Progress
) -> TrainSettings:
    """Choose the settings of a run on a folder that are not given, see `picture_defaults`; others stay as they are.

    A frozen network keeps its own size and normalisation.

    Args:
        settings: resolved settings.
        given: settings that the user gave; None values count as not given.
        data, splits: pictures and their parts; only the training part is looked at.
        device: "auto", "cpu" or "cuda".
        progress: receives a note if the time is short.
    """
    if not is_folder(settings.data) or settings.freeze:
        return settings
    index = splits.part("train")
    names = {name for name, value in given.items() if value is not None}
    progress.note("measuring how fast this machine trains")
    speed = measure_speed(select_precision(settings.precision, device))
    fit = fit_to_pictures(settings, names, sample_pictures(data, index), len(index), len(data.classes), speed)
    if fit.settings.minutes and fit.passes < FEW_PASSES:
        progress.note(
            f"{fit.settings.minutes:g} minutes are about {fit.passes:.0f} passes over the pictures, fewer than "
            f"{FEW_PASSES}:\nmore --minutes, a smaller --size or a GPU give better results"
        )
    return fit.settings


def read_pictures(
    data: DataSet, splits: Splits, settings: TrainSettings, workers: int | None, progress: Progress
) -> DataSet:
    """The data set with its training and selection images in memory, if they are files and fit.

    Args:
        data, splits: images and their parts.
        settings: settings with the network and its input.
        workers: threads that load; None = one per core.
        progress: receives a progress bar.

    Raises:
        BadInput, NotFound, Damaged: an image cannot be read; the message names it.
    """
    spec = settings.model_spec().input
    index = np.concatenate([splits.part("train"), splits.part("selection")])
    if not data.streamed or not fits_in_memory(len(index), spec):
        return data
    parts = split_batches(index, _BATCH)
    loaded = load_batches(data, parts, spec, worker_count(data, workers))

    def batches() -> Iterator[NDArray[np.float32]]:
        with progress.track("reading pictures", len(index)) as advance, closing(loaded):
            for batch in loaded:
                yield batch
                advance(len(batch), "")

    return with_prepared(data, index, spec, batches())


def normalise(settings: TrainSettings, data: DataSet, splits: Splits) -> TrainSettings:
    """Set the normalisation of a run on a folder to that of its training images, unless its network is frozen."""
    if not is_folder(settings.data) or settings.freeze:
        return settings
    return measure_normalisation(data, splits.part("train"), settings)
