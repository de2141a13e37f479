"""Sizes and colours of the pictures in a folder, from a sample of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mexit.data.dataset import DataSet, FileImages, evenly_spaced
from mexit.data.preprocess import open_image
from mexit.errors import BadInput

MEASURED, LOOKED_AT = 1000, 50  # pictures whose size, and whose colours, are read
GREY_DIFFERENCE = 8  # of 255 between two channels of a pixel: more is a colour, less an artefact of JPEG
_SIDE = 64


@dataclass(frozen=True)
class PictureSample:
    """What a sample of pictures looks like.

    Attributes:
        size: median height and width in pixels.
        grey: whether no picture of the sample has a colour.
    """

    size: tuple[int, int]
    grey: bool


def sample_pictures(data: DataSet, index: NDArray[np.int64]) -> PictureSample:
    """Read the sizes of at most 1,000 pictures, evenly spaced, and the colours of at most 50.

    Args:
        data: data set of files.
        index: positions of the pictures to sample, (n,).

    Raises:
        BadInput: none of them can be read.
    """
    images = data.images
    assert isinstance(images, FileImages)
    sizes = [size for i in evenly_spaced(index, MEASURED).tolist() if (size := _size(images, i)) is not None]
    if not sizes:
        raise BadInput(f"{data.name}: none of {min(len(index), MEASURED)} pictures can be read")
    height, width = np.median(np.asarray(sizes), axis=0).round().astype(int).tolist()
    return PictureSample((height, width), all(_is_grey(images, i) for i in evenly_spaced(index, LOOKED_AT).tolist()))


def _size(images: FileImages, i: int) -> tuple[int, int] | None:
    """Height and width, from the header of the file; None if it cannot be read."""
    try:
        with open_image(images.root / images.names[i]) as image:
            return image.height, image.width
    except Exception:  # Pillow's readers raise many exceptions on damaged files; training names the file
        return None


def _is_grey(images: FileImages, i: int) -> bool:
    """Whether a picture has no colour; True if it cannot be read."""
    try:
        with open_image(images.root / images.names[i]) as image:
            if image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I"):
                return True
            image.draft("RGB", (_SIDE, _SIDE))
            pixels = np.asarray(image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX), np.int16)
    except Exception:  # as in `_size`
        return True
    return int(np.ptp(pixels, axis=2).max()) <= GREY_DIFFERENCE
