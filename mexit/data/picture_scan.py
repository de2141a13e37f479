"""Read every picture of a data set once: whether it can be decoded, its size, mode, range and a hash of its content."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from mexit.core.progress import Progress, Silent
from mexit.data.dataset import DataSet
from mexit.data.preprocess import SCALED_FORMATS, decode_rgb, open_image
from mexit.data.read_threads import map_on_threads
from mexit.errors import MexitError

_CHUNK = 256
_SEED = 20231106


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        size: height and width in pixels, upright.
        mode: Pillow's mode of the stored picture, such as "L", "RGB" or "I;16".
        file_format: Pillow's name of the format of the file, such as "PNG"; "" for an image in memory.
        darkest, brightest: smallest and largest value of its pixels in [0, 255].
        digest: hash of the file, or of the pixels of an image in memory.
    """

    size: tuple[int, int]
    mode: str
    file_format: str
    darkest: int
    brightest: int
    digest: bytes


@dataclass(frozen=True)
class PictureScan:
    """What the pictures of a data set are like.

    Attributes:
        index: positions of the scanned pictures that can be read, in the data set, sorted, (n,) int64.
        pictures: these pictures, n.
        errors: for each picture that cannot be read, by position, why not.
        complete: whether every picture of the data set was read.
    """

    index: NDArray[np.int64]
    pictures: tuple[Picture, ...]
    errors: Mapping[int, str]
    complete: bool


def grey_bits(scan: PictureScan, index: NDArray[np.int64] | None = None) -> int | None:
    """Bits that the grey values of 16-bit files use, where the files do not declare it; None without such files.

    Sensors have 10, 12 or 14 bits, so the number is one of these or 16. It belongs to the whole data set, and a network
    keeps it: a value then means the same in every picture, in training and in serving.

    Args:
        scan: of a data set.
        index: positions of the pictures to look at, (n,); None = all.
    """
    seen = np.ones(len(scan.index), bool) if index is None else np.isin(scan.index, index)
    deep = [
        picture.brightest
        for picture, looked_at in zip(scan.pictures, seen, strict=True)
        if looked_at and picture.mode.startswith("I") and picture.file_format not in SCALED_FORMATS
    ]
    used = 8 + max(deep, default=0).bit_length()
    return next(bits for bits in (10, 12, 14, 16) if bits >= used) if deep else None


def scan_pictures(data: DataSet, *, most_seconds: float | None = None, progress: Progress | None = None) -> PictureScan:
    """Read the pictures of a data set, in a random order.

    Args:
        data: the data set.
        most_seconds: time after which the scan ends and is not complete; None = all pictures are read.
        progress: shows the number of pictures.

    Raises:
        MissingExtra: Pillow is not installed.
    """
    order = np.random.default_rng(_SEED).permutation(len(data)).astype(np.int64)
    found: dict[int, Picture] = {}
    errors: dict[int, str] = {}

    def read(i: int) -> Picture | str:
        try:
            return _read(data, i)
        except MexitError as error:
            text, name = str(error).partition(": supported are ")[0], data.images.name(i)
            return text if name in text else f"{name}: {text}"

    start_s, count = time.monotonic(), 0
    with (
        (progress or Silent()).track("checking pictures", len(data)) as advance,
        closing(map_on_threads(read, order)) as pictures_read,
    ):
        for i, picture in zip(order.tolist(), pictures_read, strict=True):
            if isinstance(picture, str):
                errors[i] = picture
            else:
                found[i] = picture
            count += 1
            advance(1, "")
            if most_seconds is not None and count % _CHUNK == 0 and time.monotonic() - start_s > most_seconds:
                break
    index = np.asarray(sorted(found), np.int64)
    pictures = tuple(found[i] for i in index.tolist())
    return PictureScan(index, pictures, dict(sorted(errors.items())), count == len(data))


def _read(data: DataSet, i: int) -> Picture:
    content = data.images.at(np.asarray([i], np.int64))[0]
    if isinstance(content, np.ndarray):
        mode, file_format, pixels, encoded = ("L" if content.ndim == 2 else "RGB"), "", content, content.tobytes()
    else:
        header = open_image(content)
        mode, file_format, pixels, encoded = header.mode, header.format or "", decode_rgb(content), content
    height, width = pixels.shape[:2]
    digest = blake2b(encoded, digest_size=16).digest()
    return Picture((height, width), mode, file_format, int(pixels.min()), int(pixels.max()), digest)
