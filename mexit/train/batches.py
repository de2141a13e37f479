"""The batches of a run: images of the training split, augmented, on the device, with the attack of the moment."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mexit.attacks.pgd import craft
from mexit.attacks.rng import CounterRNG
from mexit.core.manifest import InputSpec
from mexit.data.dataset import DataSet, evenly_spaced, split_batches
from mexit.data.splits import Splits
from mexit.models.multi_exit import MultiExit
from mexit.train.augment import augment
from mexit.train.batch_norm import recompute_statistics
from mexit.train.config import TrainSettings
from mexit.train.dataloader import load_batches
from mexit.train.device_images import DeviceImages
from mexit.train.methods.base import Batch
from mexit.train.precision import Precision

INFERENCE_BATCH = 256


@dataclass
class TrainBatches:
    """Loads batches.

    Attributes:
        data, splits: data set and its parts.
        input: input specification that the images are prepared for.
        settings: settings of the run: augmentation and attack.
        model: the trained network, which attacks use.
        precision: device and memory format of the images.
        workers: loader threads, see `dataloader.load_batches`.
    """

    data: DataSet
    splits: Splits
    input: InputSpec
    settings: TrainSettings
    model: MultiExit
    precision: Precision
    workers: int = 0
    _resident: DeviceImages | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        index, device = self.splits.part("train"), self.precision.device
        self._labels = torch.from_numpy(self.data.labels).to(device)
        if DeviceImages.fit(self.data, len(index), self.input, device):
            self._resident = DeviceImages(self.data, index, self.input, device)

    def load(self, shards: Sequence[NDArray[np.int64]], rng: CounterRNG) -> Generator[Batch, None, None]:
        """Load and augment batches in order; the attack is that of the end of the run.

        Args:
            shards: positions of training images in the data set, one array (B,) per batch.
            rng: random numbers of the epoch.
        """
        if not shards:
            return
        # One transfer for all batches: each transfer waits until the device has finished all its work.
        order = torch.from_numpy(np.concatenate(shards)).to(self.precision.device)
        indices = torch.split(order, [len(shard) for shard in shards])
        with closing(self._images(shards, indices)) as loaded:
            for shard, index, pixels in zip(shards, indices, loaded, strict=True):
                positions = index if pixels.device == index.device else torch.from_numpy(shard)
                images = augment(pixels, self.settings.augment, rng, positions, self.settings.flip)
                yield Batch(
                    self.model,
                    self.precision.to_device(images),
                    self._labels[index],
                    index,
                    self.settings.training_attack(),
                    rng,
                    self.precision.autocast,
                )

    def selection(self, rng: CounterRNG, step: int) -> tuple[Tensor, Tensor]:
        """Images and labels of a random batch of the selection split, a different one at every step."""
        index = self.splits.part("selection")
        chosen = index[rng.choice(len(index), self.settings.batch, step)]
        images = self.precision.to_device(torch.from_numpy(self.data.batch(chosen, self.input)))
        return images, self._labels[torch.from_numpy(chosen).to(self.precision.device)]

    def clean_and_attacked(self, model: MultiExit, count: int, rng: CounterRNG) -> Iterator[Tensor]:
        """Batches of at most `count` training images, evenly spaced: clean ones and, after each, attacks on `model`."""
        index = self.splits.part("train")
        shards = split_batches(evenly_spaced(index, min(count, len(index))), INFERENCE_BATCH)
        with closing(self.load(shards, rng)) as loaded:
            for batch in loaded:
                yield batch.images
                if batch.attack is not None:
                    yield craft(model, batch.images, batch.labels, batch.attack, rng=rng, index=batch.index)

    def _images(self, shards: Sequence[NDArray[np.int64]], indices: Sequence[Tensor]) -> Generator[Tensor, None, None]:
        """Prepared images of each shard, (B, C, H, W) float32, on the device if the training split is there.

        `indices` holds the same positions as `shards`, on the device.
        """
        if self._resident is not None:
            yield from map(self._resident.batch, indices)
            return
        with closing(load_batches(self.data, shards, self.input, self.workers)) as loaded:
            for pixels in loaded:
                yield torch.from_numpy(pixels)


def recompute_norms(model: MultiExit, batches: TrainBatches, epoch: int) -> Mapping[str, Tensor]:
    """Measure BatchNorm's statistics again on `recompute_norms` training images, clean and attacked.

    Args:
        model: float32 network on the device of the batches; it is changed.
        batches: of the run.
        epoch: number of the epoch, which the random numbers depend on.

    Returns:
        The weights of the network, statistics included.
    """
    settings = batches.settings
    rng = CounterRNG(settings.seed, epoch)
    recompute_statistics(model, batches.clean_and_attacked(model, settings.recompute_norms, rng))
    return model.state_dict()
