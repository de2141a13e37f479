"""Near-duplicate pictures: copies that were compressed, resized or brightened a little, and frames without motion.

Each picture is reduced to grey pixels of `HEIGHT` x `WIDTH`. Its perceptual hash (dHash, N. Krawetz, "Kind of Like
That", 2013) has one bit for each pair of horizontal neighbours of 8 x 9 means. Pairs whose hashes differ in few bits
are compared by their pixels. Pictures without contrast (a black frame, a white page) have no near-duplicates, because
their hash is noise.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.progress import Progress, Silent
from mexit.core.resource_limits import read_limits
from mexit.data.dataset import ImageStore, split_batches
from mexit.data.preprocess import open_image
from mexit.errors import missing_extra

HEIGHT, WIDTH = 16, 18
MAX_BITS = 8  # of 64
MAX_RMS = 6.0  # root mean square difference of pixels, in grey levels of 255
MIN_CORRELATION = 0.98  # of pixels
MIN_CONTRAST = 6.0  # standard deviation of the pixels, in grey levels
MAX_COMPARED = 30_000  # pictures that are all compared with each other; in larger sets only those of equal hashes
_BLOCK = 1024
_CACHE: dict[str, Thumbnails] = {}


@dataclass(frozen=True)
class Thumbnails:
    """Small grey versions of pictures.

    Attributes:
        pixels: (N, HEIGHT * WIDTH) float32 in [0, 255]; 0 where a picture cannot be read.
    """

    pixels: NDArray[np.float32]

    @cached_property
    def hashes(self) -> NDArray[np.bool_]:
        """dHash, (N, 64)."""
        means = self.pixels.reshape(-1, HEIGHT // 2, 2, WIDTH // 2, 2).mean((2, 4))
        return np.asarray((means[:, :, 1:] > means[:, :, :-1]).reshape(len(means), -1))

    @cached_property
    def contrast(self) -> NDArray[np.float32]:
        """Standard deviation of the pixels, grey levels, (N,)."""
        return np.asarray(self.pixels.std(axis=1))

    def rms(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float32]:
        """Root mean square difference of the pictures at P pairs of indices, grey levels, (P,)."""
        parts = zip(split_batches(first, _BLOCK), split_batches(second, _BLOCK), strict=True)
        squares = [((self.pixels[a] - self.pixels[b]) ** 2).mean(axis=1) for a, b in parts]
        return np.asarray(np.sqrt(np.concatenate(squares)), np.float32)

    def correlation(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float32]:
        """Correlation of the pixels of the pictures at P pairs of indices, (P,)."""
        centred = self.pixels - self.pixels.mean(axis=1, keepdims=True)
        parts = zip(split_batches(first, _BLOCK), split_batches(second, _BLOCK), strict=True)
        products = np.concatenate([(centred[a] * centred[b]).mean(axis=1) for a, b in parts])
        scale = np.maximum(self.contrast, 1e-6)
        return np.asarray(products / (scale[first] * scale[second]), np.float32)


def thumbnails(images: ImageStore, count: int, sha256: str, progress: Progress | None = None) -> Thumbnails:
    """The thumbnails of a data set. Those of the last data set are kept, so that a program reads it once.

    Args:
        images: of the data set; files that cannot be read get black thumbnails.
        count: number of images.
        sha256: of the data set.
        progress: shows the number of pictures.

    Raises:
        MissingExtra: Pillow is not installed.
    """
    if sha256 in _CACHE and len(_CACHE[sha256].pixels) == count:
        return _CACHE[sha256]
    _pillow()
    pixels = np.zeros((count, HEIGHT * WIDTH), np.float32)

    def read(i: int) -> None:
        pixels[i] = _thumbnail(images, i)

    with (
        (progress or Silent()).track("comparing pictures", count) as advance,
        ThreadPoolExecutor(read_limits().threads) as pool,
    ):
        for _ in pool.map(read, range(count)):
            advance(1, "")
    _CACHE.clear()
    _CACHE[sha256] = Thumbnails(pixels)
    return _CACHE[sha256]


def near_duplicates(thumbs: Thumbnails) -> NDArray[np.int64]:
    """Pairs of near-duplicates, (P, 2) int64: indices in the data set, the smaller one first."""
    index = np.flatnonzero(thumbs.contrast >= MIN_CONTRAST).astype(np.int64)
    first, second = _similar_hashes(thumbs.hashes[index])
    first, second = index[first], index[second]
    alike = np.flatnonzero(thumbs.rms(first, second) <= MAX_RMS) if len(first) else np.zeros(0, np.int64)
    first, second = first[alike], second[alike]
    if len(first):
        alike = np.flatnonzero(thumbs.correlation(first, second) >= MIN_CORRELATION)
        first, second = first[alike], second[alike]
    return np.stack([np.minimum(first, second), np.maximum(first, second)], axis=1)


def _similar_hashes(hashes: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the pairs of hashes (N, 64) that differ in at most `MAX_BITS` bits."""
    if len(hashes) > MAX_COMPARED:
        packed = np.packbits(hashes, axis=1).view(np.uint64).ravel()
        order = np.argsort(packed, kind="stable")
        same = np.flatnonzero(np.diff(packed[order]) == 0)
        return order[same], order[same + 1]
    signs = hashes.astype(np.float32) * 2 - 1  # the product of two hashes is 64 - 2 x (number of bits that differ)
    least = hashes.shape[1] - 2 * MAX_BITS
    pairs = []
    for start in range(0, len(signs), _BLOCK):
        rows, columns = np.nonzero(signs[start : start + _BLOCK] @ signs[start:].T >= least)
        later = columns > rows
        pairs.append(np.stack([rows[later], columns[later]]) + start)
    first, second = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), np.int64)
    return first, second


def _thumbnail(images: ImageStore, i: int) -> NDArray[np.float32]:
    """The pixels of one picture, (HEIGHT * WIDTH,); 0 if it cannot be read: training reports such a file by name."""
    pillow = _pillow()
    try:
        image = images.at(np.array([i], np.int64))[0]
        opened = pillow.fromarray(image) if isinstance(image, np.ndarray) else open_image(image)
        opened.draft("L", (8 * WIDTH, 8 * HEIGHT))  # JPEG: decodes at a fraction of the size, ten times faster
        grey = _reduce_depth(opened) if opened.mode.startswith("I") else opened.convert("L")
        small = grey.resize((WIDTH, HEIGHT), pillow.Resampling.BOX)
        return np.asarray(small, np.float32).ravel()
    except Exception:  # Pillow's decoders raise many exceptions on damaged files
        return np.zeros(HEIGHT * WIDTH, np.float32)


def _reduce_depth(image: Any) -> Any:
    """Grey values of more than 8 bits in the bits that the picture uses; `convert` would clip them at 255."""
    values = np.asarray(image)
    return _pillow().fromarray((values >> max(0, int(values.max()).bit_length() - 8)).astype(np.uint8))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise missing_extra("pillow", "cpu", "Comparing pictures") from None
    return Image
