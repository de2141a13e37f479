"""A labelled data set: where the images are, what they show, and which part is officially for testing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mexit.core.manifest import InputSpec
from mexit.data.preprocess import prepare, prepare_batch, read_image
from mexit.errors import BadInput


class Images(Protocol):
    """Random access to images, in any form that `prepare` takes."""

    def at(self, index: NDArray[np.int64]) -> Any:
        """The images at these places: a uint8 array (B, H, W[, 3]) or a list of encoded bytes."""

    def name(self, place: int) -> str:
        """What to call the image at this place when it is damaged."""


@dataclass(frozen=True)
class ArrayImages:
    """Images held in memory, uint8 (N, H, W) or (N, H, W, 3)."""

    array: NDArray[np.uint8]

    def at(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """See `Images.at`."""
        return self.array[index]

    def name(self, place: int) -> str:
        """See `Images.name`."""
        return f"image {place}"


@dataclass(frozen=True)
class FileImages:
    """Images that stay on disk until they are asked for: paths below a folder."""

    root: Path
    names: Sequence[str]

    def at(self, index: NDArray[np.int64]) -> list[bytes]:
        """See `Images.at`."""
        return [read_image(self.root / self.names[place]) for place in index.tolist()]

    def name(self, place: int) -> str:
        """See `Images.name`."""
        return f"image {self.root / self.names[place]}"


@dataclass(frozen=True)
class Pictures:
    """Images of which nobody says what they show.

    Attributes:
        name: as typed after `--data`.
        images: files.
        sha256: see `file_set`.
    """

    name: str
    images: FileImages = field(repr=False)
    sha256: str

    def __len__(self) -> int:
        return len(self.images.names)

    def batch(self, index: NDArray[np.int64], spec: InputSpec) -> NDArray[np.float32]:
        """See `DataSet.batch`."""
        return _prepared(self.images, index, spec)


@dataclass(frozen=True)
class DataSet:
    """Images and labels.

    Attributes:
        name: as typed after `--data`.
        classes: names, (C,).
        images: random access to N images.
        labels: (N,) int64.
        sha256: over every image and label; of large sets of files see `file_set`.
        official_test: places of the part that its authors set aside for testing, or None.
    """

    name: str
    classes: tuple[str, ...]
    images: Images = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    sha256: str
    official_test: NDArray[np.int64] | None = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: NDArray[np.int64], spec: InputSpec) -> NDArray[np.float32]:
        """The images at these places as input tensor (B, C, H, W) float32 in [0, 1].

        Raises:
            BadInput, NotFound, Damaged: an image that cannot be read, by name.
        """
        return _prepared(self.images, index, spec)

    @property
    def streamed(self) -> bool:
        """Whether images are read and decoded each time they are asked for."""
        return isinstance(self.images, FileImages)


def _prepared(source: Images, index: NDArray[np.int64], spec: InputSpec) -> NDArray[np.float32]:
    images = source.at(index)
    try:
        return prepare_batch(images, spec)
    except BadInput:
        for place, image in zip(index.tolist(), images, strict=True):
            _name_if_bad(source, place, image, spec)
        raise


def _name_if_bad(source: Images, place: int, image: Any, spec: InputSpec) -> None:
    try:
        prepare(image, spec)
    except BadInput as error:
        raise type(error)(f"{source.name(place)}: {error}") from None
