"""A labelled data set: where the images are, what they show, and which part is officially for testing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mexit.core.manifest import InputSpec
from mexit.data.prepare import prepare, prepare_batch, read_image
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
    """Images that stay on disk until they are asked for."""

    paths: Sequence[Path]

    def at(self, index: NDArray[np.int64]) -> list[bytes]:
        """See `Images.at`."""
        return [read_image(self.paths[place]) for place in index.tolist()]

    def name(self, place: int) -> str:
        """See `Images.name`."""
        return f"image {self.paths[place]}"


@dataclass(frozen=True)
class DataSet:
    """Images and labels.

    Attributes:
        name: as typed after `--data`.
        classes: names, (C,).
        images: random access to N images.
        labels: (N,) int64.
        sha256: over every image and label.
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
        images = self.images.at(index)
        try:
            return prepare_batch(images, spec)
        except BadInput:
            for place, image in zip(index.tolist(), images, strict=True):
                self._name_if_bad(place, image, spec)
            raise

    def _name_if_bad(self, place: int, image: Any, spec: InputSpec) -> None:
        try:
            prepare(image, spec)
        except BadInput as error:
            raise type(error)(f"{self.images.name(place)}: {error}") from None
