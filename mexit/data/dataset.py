"""Data sets: images, labels, class names and the official test part; batches and evenly spaced subsets of indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mexit.core.manifest import InputSpec
from mexit.core.printable import listed
from mexit.data.preprocess import prepare, prepare_batch, read_image
from mexit.errors import BadInput, MissingExtra, NotFound, UsageError

Scalar = TypeVar("Scalar", bound=np.generic)


class ImageStore(Protocol):
    """Random access to N images."""

    def at(self, index: NDArray[np.int64]) -> NDArray[np.uint8] | list[bytes]:
        """The images at B indices: uint8 (B, H, W) or (B, H, W, 3), or the bytes of B image files."""

    def name(self, i: int) -> str:
        """The name of image i in error messages."""


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory, uint8 (N, H, W) or (N, H, W, 3)."""

    array: NDArray[np.uint8]

    def at(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self.array[index]

    def name(self, i: int) -> str:
        return f"image {i}"


@dataclass(frozen=True)
class FileImages:
    """Image files, read on each access; `names` are paths below `root`."""

    root: Path
    names: Sequence[str]

    def at(self, index: NDArray[np.int64]) -> list[bytes]:
        """The bytes of the files at B indices. Raises `NotFound`, `Damaged`, `TooLarge`."""
        return [read_image(self.root / self.names[i]) for i in index.tolist()]

    def name(self, i: int) -> str:
        return f"image {self.root / self.names[i]}"


@dataclass(frozen=True)
class PreparedImages:
    """Images of which some are in memory as the input tensor of one specification.

    Attributes:
        source: all N images.
        input: input specification of the pixels in memory.
        pixels: (n, C, H, W) uint8.
        rows: row of `pixels` that holds each image, -1 = none, (N,) int64.
    """

    source: ImageStore
    input: InputSpec
    pixels: NDArray[np.uint8] = field(repr=False)
    rows: NDArray[np.int64] = field(repr=False)

    def at(self, index: NDArray[np.int64]) -> NDArray[np.uint8] | list[bytes]:
        """The images at B indices, as `source` returns them."""
        return self.source.at(index)

    def name(self, i: int) -> str:
        """The name of image i in error messages."""
        return self.source.name(i)

    def prepared(self, index: NDArray[np.int64], spec: InputSpec) -> NDArray[np.float32] | None:
        """The input tensor (B, C, H, W) float32 in [0, 1], or None if an image is not in memory for `spec`."""
        rows = self.rows[index]
        if spec != self.input or (rows < 0).any():
            return None
        return self.pixels[rows].astype(np.float32) / np.float32(255)


@dataclass(frozen=True)
class UnlabelledImages:
    """Images without labels.

    Attributes:
        name: as typed after `--data`.
        images: files.
        sha256: as `image_files` defines it.
    """

    name: str
    images: FileImages = field(repr=False)
    sha256: str

    def __len__(self) -> int:
        return len(self.images.names)

    def batch(self, index: NDArray[np.int64], spec: InputSpec) -> NDArray[np.float32]:
        """The images at B indices as in `DataSet.batch`."""
        return _prepare_images(self.images, index, spec)


@dataclass(frozen=True)
class DataSet:
    """Images and labels.

    Attributes:
        name: as typed after `--data`.
        classes: names, (C,).
        images: N images.
        labels: (N,) int64.
        sha256: of all images and labels; for large sets of files, `image_files` defines it.
        official_test: indices of the test part that its authors defined, or None.
        official_val: indices of the validation part that they defined beside a test part, or None.
        skipped: for folders, counts of the entries that are not images of the set, by suffix or reason.
    """

    name: str
    classes: tuple[str, ...]
    images: ImageStore = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    sha256: str
    official_test: NDArray[np.int64] | None = field(repr=False)
    official_val: NDArray[np.int64] | None = field(default=None, repr=False)
    skipped: Mapping[str, int] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: NDArray[np.int64], spec: InputSpec) -> NDArray[np.float32]:
        """The images at B indices as the input tensor (B, C, H, W) float32 in [0, 1].

        Raises:
            BadInput, NotFound, Damaged: an image cannot be read; the message names it.
        """
        return _prepare_images(self.images, index, spec)

    def with_classes(self, classes: tuple[str, ...], owner: str) -> DataSet:
        """The same images, with the classes in the given order.

        Args:
            classes: names, (C,).
            owner: what has these classes, for the message.

        Raises:
            UsageError: the data set has other classes.
        """
        if self.classes == classes:
            return self
        if sorted(self.classes) != sorted(classes):
            raise UsageError(
                f"{self.name} has the classes {listed(self.classes, show=repr)}; {owner} has "
                f"{listed(classes, show=repr)}: give the class folders these names, or name them in classes.txt"
            )
        places = {name: place for place, name in enumerate(classes)}
        order = np.asarray([places[name] for name in self.classes], np.int64)
        return replace(self, classes=classes, labels=order[self.labels])

    @property
    def streamed(self) -> bool:
        """Whether images are read and decoded on each access."""
        return isinstance(self.images, FileImages)


def split_batches(array: NDArray[Scalar], size: int) -> list[NDArray[Scalar]]:
    """Consecutive parts of at most `size` entries along the first axis; an empty array is one empty part."""
    return np.array_split(array, range(size, len(array), size))


def evenly_spaced(array: NDArray[Scalar], most: int | None) -> NDArray[Scalar]:
    """At most `most` entries along the first axis, evenly spaced and in order; None = all."""
    if most is None or most >= len(array):
        return array
    return array[np.linspace(0, len(array) - 1, most).astype(np.int64)]


def find_folder(name: str, candidates: Sequence[Path], is_data: Callable[[Path], bool], expected: str) -> Path:
    """The first candidate folder that holds the data set `name`.

    Args:
        name: of the data set, for the message.
        candidates: folders to search.
        is_data: whether a folder holds the data set.
        expected: what the folder must hold, for the message.

    Raises:
        NotFound: none of the candidates does.
    """
    for folder in candidates:
        if is_data(folder):
            return folder
    raise NotFound(
        f"no {name} in {' or '.join(map(str, candidates))}: expected {expected}; --data-dir or MEXIT_DATA names the "
        "folder above"
    )


def _prepare_images(store: ImageStore, index: NDArray[np.int64], spec: InputSpec) -> NDArray[np.float32]:
    if isinstance(store, PreparedImages) and (tensor := store.prepared(index, spec)) is not None:
        return tensor
    images = store.at(index)
    try:
        return prepare_batch(images, spec)
    except (BadInput, MissingExtra):
        for i, image in zip(index.tolist(), images, strict=True):  # find the image at fault, to name it
            try:
                prepare(image, spec)
            except (BadInput, MissingExtra) as error:
                raise type(error)(f"{store.name(i)}: {error}") from None
        raise
