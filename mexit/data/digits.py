"""Read the digits data set that is part of the package: 1,797 grey images of 8 x 8 pixels, from scikit-learn.

E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998,
CC BY 4.0. `digits-LICENSE.md` beside this file lists the changes.
"""

from __future__ import annotations

import io
from importlib import resources

import numpy as np

from mexit.core.atomic_io import sha256_bytes
from mexit.data.dataset import ArrayImages, DataSet


def load() -> DataSet:
    """Read the whole set. It has no official test part."""
    content = (resources.files("mexit.data") / "digits.npz").read_bytes()
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        images, labels = file["images"], file["labels"].astype(np.int64)
    grey = np.rint(images * (255 / 16)).astype(np.uint8)
    classes = tuple(str(digit) for digit in range(10))
    sha256 = sha256_bytes(grey.tobytes() + labels.tobytes())
    return DataSet("digits", classes, ArrayImages(grey), labels, sha256, official_test=None)
