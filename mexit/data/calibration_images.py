"""Calibration images stored in a bundle, for devices without the data set or torch.

One npz file per split and condition, `calibration/<split>-<clean|attacked>.npz`: images (n, C, H, W) float32 in
[0, 1], labels (n,), indices in the data set (n,), group ids (n,) where groups exist, and a JSON description. The clean
and the attacked file of a split hold the same samples in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mexit.core.atomic_io import read_npz, to_npz
from mexit.core.manifest import InputSpec
from mexit.core.schema import decode
from mexit.data.preprocess import check_tensor
from mexit.errors import BadInput, Damaged

MAX_BYTES = 4 << 30


@dataclass(frozen=True)
class CalibrationImages:
    """Input tensors of one split under one condition.

    Attributes:
        split: "calibration" or "certification".
        condition: "clean", or the full description of the attack.
        data_sha256: of the data set that the images are from.
        images: (n, C, H, W) float32 in [0, 1].
        labels, index: (n,) int64; `index` is the index in the data set.
        groups: (n,) int64, group id of each image, or None without groups.
    """

    split: str
    condition: str
    data_sha256: str
    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    index: NDArray[np.int64]
    groups: NDArray[np.int64] | None = None

    @property
    def file(self) -> str:
        """The path in the bundle."""
        return f"calibration/{self.split}-{'clean' if self.condition == 'clean' else 'attacked'}.npz"

    def to_bytes(self) -> bytes:
        """The npz file."""
        about = {"split": self.split, "condition": self.condition, "data_sha256": self.data_sha256}
        groups = {} if self.groups is None else {"groups": self.groups}
        return to_npz(about=about, images=self.images, labels=self.labels, index=self.index, **groups)

    @staticmethod
    def from_bytes(content: bytes, file: str, spec: InputSpec, classes: int) -> CalibrationImages:
        """Parse and check the content of the bundle's file `file`. Raises `Damaged`."""
        try:
            arrays = read_npz(content, MAX_BYTES)
            about = decode(json.loads(arrays["about"].tobytes()), Mapping[str, str], "about")
            images = check_tensor(arrays["images"], spec)
            labels, index = (arrays[name].astype(np.int64, casting="safe") for name in ("labels", "index"))
            if not len(images) or labels.shape != (len(images),) or index.shape != (len(images),):
                raise BadInput(f"it has {len(images)} images, labels {labels.shape}, indices {index.shape}")
            groups = arrays["groups"].astype(np.int64, casting="safe") if "groups" in arrays else None
            if groups is not None and groups.shape != (len(images),):
                raise BadInput(f"it has {len(images)} images, groups {groups.shape}")
            if labels.min() < 0 or labels.max() >= classes:
                raise BadInput(f"its labels are {labels.min()} to {labels.max()}, expected 0 to {classes - 1}")
            return CalibrationImages(
                about["split"], about["condition"], about["data_sha256"], images, labels, index, groups
            )
        except (ValueError, KeyError, TypeError, BadInput, Damaged) as error:
            raise Damaged(f"calibration images {file} are not readable: {error}") from None
