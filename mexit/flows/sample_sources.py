"""Sources of calibration samples: a data set with its splits, unlabelled pictures, or the images in a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mexit.core.bundle import Bundle
from mexit.core.manifest import InputSpec
from mexit.core.progress import Progress
from mexit.data.calibration_images import CalibrationImages
from mexit.data.dataset import DataSet, UnlabelledImages, evenly_spaced, split_batches
from mexit.data.groups import Grouping
from mexit.data.known_pictures import groups_that_trained
from mexit.data.splits import Splits
from mexit.errors import Damaged
from mexit.runtime.trace_recorder import Batch

BATCH = 64
# The largest number of attacked samples per split; they are crafted in float32, as reported robustness requires.
MAX_ATTACKED = {"calibration": 500, "certification": 1000}
MAX_TEST = 2000  # test samples, evenly spaced
_SEED = 20231106

Images = NDArray[np.float32]
Logits = NDArray[np.float32]
Labels = NDArray[np.int64]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class SampleBatches:
    """Samples of one split under one condition.

    Attributes:
        split: "calibration" or "certification".
        condition: "clean", or the description of the attack.
        n: number of samples.
        batches: images (B, C, H, W), labels (B,) or None, and indices in the data set (B,).
        groups: group id of every sample in the order of the batches, (n,), or None without groups.
    """

    split: str
    condition: str
    n: int
    batches: Iterator[Batch]
    groups: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class UnseenSamples:
    """Samples of the test split.

    Attributes:
        samples: None if the source has none.
        of: size of the test split.
        missing: the reason why there are none.
    """

    samples: SampleBatches | None
    of: int = 0
    missing: str = ""


class SampleSource(Protocol):
    """A source of calibration samples."""

    @property
    def data_sha256(self) -> str:
        """The sha256 of the data set."""

    @property
    def size(self) -> int | None:
        """Number of groups in the whole data set, or of samples where they form no groups; None if unknown."""

    def clean(self, split: str) -> SampleBatches:
        """The clean samples of a split. Raises `Damaged`."""

    def attacked(self, split: str) -> SampleBatches | None:
        """Attacked samples of a split, at most `MAX_ATTACKED`; None if the source has none."""

    def test(self) -> UnseenSamples:
        """Clean samples of the test split, at most `MAX_TEST`. They must not select anything."""


@dataclass(frozen=True)
class Attack:
    """An attack on the network behind a bundle.

    Attributes:
        description: the whole attack in words.
        craft: images (B, C, H, W), labels (B,) and indices (B,) to attacked images.
    """

    description: str
    craft: Callable[[Images, Labels, Index], Images]


@dataclass(frozen=True)
class DatasetSource:
    """A data set with its splits.

    Attributes:
        data, splits: the samples.
        spec: the input of the bundle.
        attack: None = no attacked samples; they are crafted while they are iterated.
    """

    data: DataSet
    splits: Splits
    spec: InputSpec
    attack: Attack | None = None

    @property
    def data_sha256(self) -> str:
        return self.data.sha256

    @property
    def size(self) -> int | None:
        groups = self.splits.groups
        return len(self.data) if groups is None else len(np.unique(groups))

    def clean(self, split: str) -> SampleBatches:
        index = self.splits.part(split)
        return SampleBatches(split, "clean", len(index), self._batches(index), self.splits.groups_of(index))

    def attacked(self, split: str) -> SampleBatches | None:
        if self.attack is None:
            return None
        craft = self.attack.craft
        index = evenly_spaced(self.splits.part(split), MAX_ATTACKED[split])
        batches = ((craft(images, labels, rows), labels, rows) for images, labels, rows in self._batches(index))
        groups = self.splits.groups_of(index)
        return SampleBatches(split, self.attack.description, len(index), batches, groups)

    def test(self) -> UnseenSamples:
        part = self.splits.part("test")
        index = evenly_spaced(part, MAX_TEST)
        if not len(index):
            return UnseenSamples(None, missing=f"the splits of {self.data.name} have no test images")
        samples = SampleBatches("test", "clean", len(index), self._batches(index), self.splits.groups_of(index))
        return UnseenSamples(samples, len(part))

    def _batches(self, index: Index) -> Iterator[tuple[Images, Labels, Index]]:
        for rows in split_batches(index, BATCH):
            yield self.data.batch(rows, self.spec), self.data.labels[rows], rows


@dataclass(frozen=True)
class UnlabelledSource:
    """Images without labels, divided at random into a calibration and a certification half; groups are not divided.

    None are attacked: an attack maximises the loss of the correct label, which is unknown.

    Attributes:
        images: the samples; labels of a data set are not used.
        spec: the input of the bundle.
        condition: of the traces, see `core.trace.Origin`.
        groups: group id of each image, (N,); a group lies in one half. None = each image is its own group.
        left_out: ids of groups that are in no half.
    """

    images: UnlabelledImages | DataSet
    spec: InputSpec
    condition: str = "clean"
    groups: NDArray[np.int64] | None = None
    left_out: tuple[int, ...] = ()

    @staticmethod
    def of(
        images: UnlabelledImages | DataSet,
        spec: InputSpec,
        condition: str = "clean",
        grouping: Grouping | None = None,
        known: NDArray[np.int64] | None = None,
    ) -> UnlabelledSource:
        """Images, without those that trained the network and those of their groups.

        Args:
            images, spec, condition: as in the class.
            grouping: groups of the images.
            known: stored split of each image, see `known_pictures.known_splits`.
        """
        groups = grouping.ids if grouping is not None and grouping.has_groups else None
        source = UnlabelledSource(images, spec, condition, groups)
        return source if known is None else replace(source, left_out=tuple(groups_that_trained(known, source.ids)))

    @property
    def ids(self) -> Index:
        """Group id of each image, (N,)."""
        return np.arange(len(self.images), dtype=np.int64) if self.groups is None else self.groups

    @property
    def used(self) -> Index:
        """Ids of the groups, or of the images without groups, that are not left out."""
        return np.setdiff1d(self.ids, np.asarray(self.left_out, np.int64))

    @property
    def data_sha256(self) -> str:
        return self.images.sha256

    @property
    def size(self) -> int | None:
        return len(np.unique(self.ids))

    def clean(self, split: str) -> SampleBatches:
        ids = self.ids
        order = np.random.default_rng(_SEED).permutation(self.used)
        halves = dict(zip(MAX_ATTACKED, np.array_split(order, len(MAX_ATTACKED)), strict=True))
        index = np.flatnonzero(np.isin(ids, halves[split])).astype(np.int64)
        groups = None if self.groups is None else self.groups[index]
        batches = ((self.images.batch(rows, self.spec), None, rows) for rows in split_batches(index, BATCH))
        return SampleBatches(split, self.condition, len(index), batches, groups)

    def attacked(self, split: str) -> SampleBatches | None:  # noqa: ARG002
        return None

    def test(self) -> UnseenSamples:
        return UnseenSamples(None, missing=f"{self.images.name} has neither labels nor test images")


@dataclass(frozen=True)
class BundleSource:
    """The images stored in a bundle.

    Attributes:
        images: by file name in the bundle.
        data_sha256: the sha256 of the data set that they are from.
        size: that data set's number of groups, which the bundle does not store.
    """

    images: Mapping[str, CalibrationImages]
    data_sha256: str
    size: int | None = None

    @staticmethod
    def of(bundle: Bundle) -> BundleSource | None:
        """The images of a bundle, or None if it has none. Raises `Damaged` for an unreadable file."""
        manifest = bundle.manifest
        images = {
            spec.file: CalibrationImages.from_bytes(
                bundle.content(spec.file), spec.file, manifest.input, len(manifest.classes)
            )
            for spec in manifest.calibration
        }
        return BundleSource(images, next(iter(images.values())).data_sha256) if images else None

    def clean(self, split: str) -> SampleBatches:
        samples = self._batches(split, "clean")
        if samples is None:
            raise Damaged(f"the bundle has calibration images, but no clean ones of the split '{split}'")
        return samples

    def attacked(self, split: str) -> SampleBatches | None:
        return self._batches(split, "attacked")

    def test(self) -> UnseenSamples:
        return UnseenSamples(None, missing="the bundle carries no test images; the data set has them")

    def _batches(self, split: str, condition: str) -> SampleBatches | None:
        images = self.images.get(f"calibration/{split}-{condition}.npz")
        if images is None:
            return None
        arrays = (split_batches(array, BATCH) for array in (images.images, images.labels, images.index))
        batches = zip(*arrays, strict=True)
        return SampleBatches(images.split, images.condition, len(images.index), batches, images.groups)


def gather(source: SampleSource, progress: Progress) -> list[CalibrationImages]:
    """Collect the images to store in a bundle.

    Args:
        source: of labelled samples.
        progress: shows the number of images.

    Returns:
        For each split at most `MAX_ATTACKED` images, attacked and clean versions of the same samples.
    """
    collected = []
    for split, most in MAX_ATTACKED.items():
        kept_index = None
        for samples in filter(None, (source.attacked(split), source.clean(split))):
            parts = []
            with progress.track(f"gathering {split} images", samples.n) as advance:
                for batch in samples.batches:
                    parts.append(batch)
                    advance(len(batch[0]), "")
            arrays = [np.concatenate([part[axis] for part in parts]) for axis in range(3)]
            kept_index = evenly_spaced(arrays[2], most) if kept_index is None else kept_index
            rows = np.flatnonzero(np.isin(arrays[2], kept_index))
            images, labels, index = (array[rows] for array in arrays)
            groups = None if samples.groups is None else samples.groups[rows]
            origin = split, samples.condition, source.data_sha256
            collected.append(CalibrationImages(*origin, images, labels, index, groups))
    return collected
