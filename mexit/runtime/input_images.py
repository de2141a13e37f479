"""The images that a runtime accepts, as its input tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.manifest import InputSpec
from mexit.data.preprocess import check_tensor, prepare_batch
from mexit.errors import BadInput


def prepare_images(images: NDArray[Any] | Sequence[Any] | bytes, spec: InputSpec) -> NDArray[np.float32]:
    """Convert images to the input tensor, (B, C, H, W) float32 in [0, 1].

    Args:
        images: as in a call of `Runtime`.
        spec: the input of the bundle.

    Raises:
        BadInput, TooLarge: an input is not a valid image.
    """
    if isinstance(images, np.ndarray):
        if images.dtype.kind == "f":
            return check_tensor(images, spec)
        if images.dtype != np.uint8:
            raise BadInput(f"expected uint8 or float32 images, found {images.dtype}")
        if images.ndim == 2 or (images.ndim == 3 and images.shape[2] in (3, 4)):
            return prepare_batch(images[None], spec)
        if images.ndim != 4:
            raise BadInput(f"expected uint8 (H, W), (H, W, 3) or (B, H, W, 3), found {images.shape}")
        return prepare_batch(images, spec)
    if isinstance(images, list | tuple):
        return prepare_batch(images, spec)
    return prepare_batch([images], spec)
