"""A labelled data set: where the images are, what they show, and which part is officially for testing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mexit.core.files import read_bytes
from mexit.core.manifest import InputSpec
from mexit.data.prepare import MAX_ENCODED_BYTES, prepare_batch


class Images(Protocol):
    """Random access to images, in any form that `prepare` takes."""

    def at(self, index: NDArray[np.int64]) -> Any:
        """The images at these places: a uint8 array (B, H, W[, 3]) or a list of encoded bytes."""


@dataclass(frozen=True)
class ArrayImages:
    """Images held in memory, uint8 (N, H, W) or (N, H, W, 3)."""

    array: NDArray[np.uint8]

    def at(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """See `Images.at`."""
        return self.array[index]


@dataclass(frozen=True)
class FileImages:
    """Images that stay on disk until they are asked for."""

    paths: Sequence[Path]

    def at(self, index: NDArray[np.int64]) -> list[bytes]:
        """See `Images.at`."""
        return [read_bytes(self.paths[place], "image", MAX_ENCODED_BYTES) for place in index.tolist()]


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
        """The images at these places as input tensor (B, C, H, W) float32 in [0, 1]."""
        return prepare_batch(self.images.at(index), spec)
