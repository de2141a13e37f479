"""Where calibration gets its samples: a data set with its splits, pictures, or the images in the bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mexit.core.bundle import Bundle
from mexit.core.manifest import InputSpec
from mexit.core.progress import Progress
from mexit.data.calibration_images import CalibrationImages
from mexit.data.dataset import DataSet, UnlabelledImages
from mexit.data.splits import Splits
from mexit.evaluate.gradient_source import Source
from mexit.runtime.trace_recorder import Batch

BATCH = 64
# Reported robustness is computed in float32, slowly: at most so many samples are attacked.
ATTACKED = {"calibration": 500, "certification": 1000}
_SEED = 20231106


@dataclass(frozen=True)
class Samples:
    """Samples of one split under one condition, in batches."""

    split: str
    condition: str
    n: int
    batches: Iterator[Batch]


class SampleSource(Protocol):
    """A source of samples."""

    @property
    def data_sha256(self) -> str:
        """Of the data set that the samples are from."""

    def clean(self, split: str) -> Samples:
        """The samples of a split as they are."""

    def attacked(self, split: str) -> Samples | None:
        """Some of them under attack, or None where there are none."""


@dataclass(frozen=True)
class DatasetSource:
    """A data set and its splits; attacks with the gradients of `source`, if there is one."""

    data: DataSet
    splits: Splits
    spec: InputSpec
    source: Source | None
    objective: str

    @property
    def data_sha256(self) -> str:
        """See `SampleSource`."""
        return self.data.sha256

    def clean(self, split: str) -> Samples:
        """See `SampleSource.clean`."""
        index = self.splits.part(split)
        return Samples(split, "clean", len(index), self._batches(index))

    def attacked(self, split: str) -> Samples | None:
        """See `SampleSource.attacked`; at most `ATTACKED` samples, evenly spaced."""
        if self.source is None:
            return None
        attack = self.source.attack(self.objective, None, None)
        craft = self.source.crafter(attack)
        index = evenly(self.splits.part(split), ATTACKED[split])
        batches = ((craft(images, labels, place), labels, place) for images, labels, place in self._batches(index))
        return Samples(split, attack.describe(), len(index), batches)

    def _batches(
        self, index: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]]:
        for part in np.array_split(index, range(BATCH, len(index), BATCH)):
            yield self.data.batch(part, self.spec), self.data.labels[part], part


@dataclass(frozen=True)
class UnlabelledSource:
    """Pictures without labels, cut into two halves at random; none of them is attacked."""

    pictures: UnlabelledImages
    spec: InputSpec

    @property
    def data_sha256(self) -> str:
        """See `SampleSource`."""
        return self.pictures.sha256

    def clean(self, split: str) -> Samples:
        """See `SampleSource.clean`."""
        order = np.random.default_rng(_SEED).permutation(len(self.pictures)).astype(np.int64)
        halves = dict(zip(ATTACKED, np.array_split(order, len(ATTACKED)), strict=True))
        index = np.sort(halves[split])
        parts = np.array_split(index, range(BATCH, len(index), BATCH))
        batches = ((self.pictures.batch(part, self.spec), None, part) for part in parts)
        return Samples(split, "clean", len(index), batches)

    def attacked(self, split: str) -> Samples | None:
        """None: the attack climbs the loss of the right answer, which is not known."""


@dataclass(frozen=True)
class BundleSource:
    """The images in a bundle, by file."""

    found: Mapping[str, CalibrationImages]
    data_sha256: str

    @staticmethod
    def of(bundle: Bundle) -> BundleSource | None:
        """The images of a bundle, or None if it carries none."""
        manifest = bundle.manifest
        found = {
            spec.file: CalibrationImages.from_bytes(
                bundle.content(spec.file), spec.file, manifest.input, len(manifest.classes)
            )
            for spec in manifest.calibration
        }
        return BundleSource(found, next(iter(found.values())).data_sha256) if found else None

    def clean(self, split: str) -> Samples:
        """See `SampleSource.clean`."""
        return _in_batches(self.found[f"calibration/{split}-clean.npz"])

    def attacked(self, split: str) -> Samples | None:
        """See `SampleSource.attacked`."""
        images = self.found.get(f"calibration/{split}-attacked.npz")
        return _in_batches(images) if images else None


def gather(pool: SampleSource, progress: Progress) -> list[CalibrationImages]:
    """The images to put into a bundle: at most `ATTACKED` of each split, clean ones paired with the attacked."""
    kept = []
    for split in ATTACKED:
        attacked = pool.attacked(split)
        wanted = None
        for samples in (attacked, pool.clean(split)):
            if samples is not None:
                with progress.track(f"gathering {split} images", samples.n) as advance:
                    parts = []
                    for batch in samples.batches:
                        parts.append(batch)
                        advance(len(batch[0]), "")
                images, labels, index = (np.concatenate([part[axis] for part in parts]) for axis in range(3))
                wanted = evenly(index, ATTACKED[split]) if wanted is None else wanted
                rows = np.flatnonzero(np.isin(index, wanted))
                kept.append(
                    CalibrationImages(
                        split, samples.condition, pool.data_sha256, images[rows], labels[rows], index[rows]
                    )
                )
    return kept


def evenly(index: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most so many entries, evenly spaced."""
    return index if len(index) <= most else index[np.linspace(0, len(index) - 1, most).astype(np.int64)]


def _in_batches(images: CalibrationImages) -> Samples:
    cuts = range(BATCH, len(images.index), BATCH)
    arrays = (np.array_split(array, cuts) for array in (images.images, images.labels, images.index))
    return Samples(images.split, images.condition, len(images.index), zip(*arrays, strict=True))
