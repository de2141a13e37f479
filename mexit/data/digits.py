"""UCI's handwritten digits as scikit-learn ships them: 1,797 grey images of 8 x 8 pixels, in the package.

E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998,
CC BY 4.0. `digits-LICENSE.md` beside this file says what was changed.
"""

from __future__ import annotations

import io
from importlib import resources

import numpy as np

from mexit.core.atomic_io import sha256_bytes
from mexit.data.dataset import ArrayImages, DataSet


def load() -> DataSet:
    """The whole set; it has no official test part, so `splits` sets one aside."""
    content = (resources.files("mexit.data") / "digits.npz").read_bytes()
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        images, labels = file["images"], file["labels"].astype(np.int64)
    grey = np.rint(images * (255 / 16)).astype(np.uint8)
    classes = tuple(str(digit) for digit in range(10))
    digest = sha256_bytes(grey.tobytes() + labels.tobytes())
    return DataSet("digits", classes, ArrayImages(grey), labels, digest, None)
