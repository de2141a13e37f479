"""Near-duplicate pictures: copies that were compressed, resized or brightened a little, and frames without motion.

Each picture is reduced to grey pixels of `HEIGHT` x `WIDTH`. Its perceptual hash (dHash, N. Krawetz, "Kind of Like
That", 2013) has one bit for each pair of horizontal neighbours of 8 x 9 means. Pairs whose hashes differ in few bits
are compared by their pixels. Pictures without contrast (a black frame, a white page) have no near-duplicates, because
their hash is noise. The pictures are compared block by block, and a pair that is linked already is not compared again,
so memory and time stay bounded where all pictures look alike.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.progress import Progress, Silent
from mexit.data.dataset import ImageStore, split_batches
from mexit.data.preprocess import open_image
from mexit.data.read_threads import map_on_threads
from mexit.errors import missing_extra

HEIGHT, WIDTH = 16, 18
MAX_BITS = 8  # of 64
MAX_RMS = 6.0  # root mean square difference of pixels, in grey levels of 255
MIN_CORRELATION = 0.98  # of pixels
MIN_CONTRAST = 6.0  # standard deviation of the pixels, in grey levels
MAX_PICTURES = 100_000  # of a data set; in larger sets, reading them all would take longer than an hour
MAX_COMPARED = 30_000  # pictures that are all compared with each other; in larger sets, those of neighbouring hashes
_BLOCK = 1024
LOGGED = 10_000  # pictures for each line about the progress
_CACHE: dict[str, Thumbnails] = {}


class Thumbnails:
    """Small grey versions of the pictures of a data set, read when they are needed.

    Args:
        images: of the data set; files that cannot be read get black thumbnails.
        count: number of images.
        progress: shows the number of pictures.

    Attributes:
        pixels: (N, HEIGHT * WIDTH) uint8; 0 where a picture is not read yet.
    """

    def __init__(self, images: ImageStore, count: int, progress: Progress | None = None) -> None:
        self.pixels = np.zeros((count, HEIGHT * WIDTH), np.uint8)
        self._is_read = np.zeros(count, bool)
        self._images = images
        self._progress = progress or Silent()

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: NDArray[np.int64]) -> None:
        """Read the pictures at some indices, (n,), each once."""
        missing = np.unique(index[~self._is_read[index]])
        if not len(missing):
            return
        with self._progress.track("comparing pictures", len(missing)) as advance:
            thumbs = map_on_threads(lambda i: _thumbnail(self._images, i), missing)
            for done, (i, pixels) in enumerate(zip(missing.tolist(), thumbs, strict=True), start=1):
                self.pixels[i] = pixels
                advance(1, "")
                if done % LOGGED == 0:
                    self._progress.log(f"looking for near-duplicates: {done:,} of {len(missing):,} pictures are read")
        self._is_read[missing] = True

    @cached_property
    def contrast(self) -> NDArray[np.float32]:
        """Standard deviation of the pixels, grey levels, (N,)."""
        return np.concatenate([part.std(axis=1, dtype=np.float32) for part in split_batches(self.pixels, _BLOCK)])

    def hashes(self, index: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The dHash of some pictures, (n, 64)."""
        return np.concatenate([_hashes(self.pixels[part]) for part in split_batches(index, _BLOCK)])

    def rms(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float32]:
        """Root mean square difference of the pictures at P pairs of indices, grey levels, (P,)."""
        self.read(np.concatenate([first, second]))
        parts = zip(split_batches(first, _BLOCK), split_batches(second, _BLOCK), strict=True)
        pixels = ((self.pixels[a].astype(np.float32), self.pixels[b]) for a, b in parts)
        return np.asarray(np.sqrt(np.concatenate([((one - other) ** 2).mean(axis=1) for one, other in pixels])))

    def alike(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether pictures have nearly the same pixels: each of A indices and each of B, (A, B)."""
        one, other = self.pixels[first].astype(np.float32), self.pixels[second].astype(np.float32)
        means = one.mean(axis=1)[:, None], other.mean(axis=1)[None]
        deviations = np.maximum(self.contrast[first], 1e-6)[:, None], np.maximum(self.contrast[second], 1e-6)[None]
        covariance = (one - means[0]) @ (other - means[1].T).T / one.shape[1]
        squares = deviations[0] ** 2 + deviations[1] ** 2 - 2 * covariance + (means[0] - means[1]) ** 2
        same = (squares <= MAX_RMS**2) & (covariance >= MIN_CORRELATION * deviations[0] * deviations[1])
        return np.asarray(same)


def thumbnails(images: ImageStore, count: int, sha256: str, progress: Progress | None = None) -> Thumbnails:
    """The thumbnails of a data set. Those of the last data set are kept, so that a program reads it once.

    Args:
        images: of the data set.
        count: number of images.
        sha256: of the data set.
        progress: shows the number of pictures.

    Raises:
        MissingExtra: Pillow is not installed.
    """
    if sha256 in _CACHE and len(_CACHE[sha256]) == count:
        return _CACHE[sha256]
    _pillow()
    _CACHE.clear()
    _CACHE[sha256] = Thumbnails(images, count, progress)
    return _CACHE[sha256]


def near_duplicates(thumbs: Thumbnails) -> NDArray[np.int64] | None:
    """Links between near-duplicates.

    Returns:
        Pairs of near-duplicates, (P, 2) int64: indices in the data set, the smaller one first. They connect all
        pictures that a chain of near-duplicates connects, with P < N. None for more than `MAX_PICTURES` pictures.
    """
    if len(thumbs) > MAX_PICTURES:
        return None
    thumbs.read(np.arange(len(thumbs), dtype=np.int64))
    index = np.flatnonzero(thumbs.contrast >= MIN_CONTRAST).astype(np.int64)
    hashes = thumbs.hashes(index)
    reach = len(index)
    if len(index) > MAX_COMPARED:
        order = np.argsort(np.packbits(hashes, axis=1).view(">u8").ravel(), kind="stable")
        index, hashes, reach = index[order], hashes[order], 2
    blocks = split_batches(np.arange(len(index)), _BLOCK)
    component = np.arange(len(index))
    links: list[tuple[int, int]] = []
    for number, rows in enumerate(blocks):
        for columns in blocks[number : number + reach]:
            if len(np.unique(component[np.concatenate([rows, columns])])) == 1:
                continue
            similar = _similar(hashes[rows], hashes[columns])
            similar &= component[rows][:, None] != component[columns]
            if columns is rows:
                similar = np.triu(similar, 1)
            a, b = rows[similar.any(axis=1)], columns[similar.any(axis=0)]
            if len(a):
                alike = similar[np.ix_(a - rows[0], b - columns[0])] & thumbs.alike(index[a], index[b])
                links += _join(alike, a, b, component)
    pairs = index[np.asarray(links, np.int64).reshape(-1, 2)]
    return np.sort(pairs, axis=1)


def _hashes(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    means = pixels.reshape(-1, HEIGHT // 2, 2, WIDTH // 2, 2).mean((2, 4))
    return np.asarray((means[:, :, 1:] > means[:, :, :-1]).reshape(len(means), HEIGHT // 2 * (WIDTH // 2 - 1)))


def _similar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether hashes (A, 64) and (B, 64) differ in at most `MAX_BITS` bits, (A, B)."""
    signs = [hashes.astype(np.float32) * 2 - 1 for hashes in (first, second)]
    return np.asarray(signs[0] @ signs[1].T >= first.shape[1] - 2 * MAX_BITS)  # 64 - 2 x (number of bits that differ)


def _join(
    alike: NDArray[np.bool_], rows: NDArray[np.int64], columns: NDArray[np.int64], component: NDArray[np.int64]
) -> list[tuple[int, int]]:
    """Join the components of pictures that are alike.

    Args:
        alike: (A, B).
        rows, columns: pictures, (A,) and (B,).
        component: number of the component of each picture, (N,); changed in place.

    Returns:
        One pair of pictures for each component that was joined with another.
    """
    nodes = np.concatenate([rows, columns])
    own, links = component[nodes], []
    for row in np.flatnonzero(alike.any(axis=1)).tolist():
        others = np.flatnonzero(alike[row])
        found, first = np.unique(own[len(rows) + others], return_index=True)
        new = found != own[row]
        if new.any():
            links += [(int(rows[row]), int(columns[other])) for other in others[first[new]]]
            own[np.isin(own, found)] = own[row]
    if links:
        renamed = np.arange(len(component))
        renamed[component[nodes]] = own
        component[:] = renamed[component]
    return links


def _thumbnail(images: ImageStore, i: int) -> NDArray[np.uint8]:
    """The pixels of one picture, (HEIGHT * WIDTH,); 0 if it cannot be read: training reports such a file by name."""
    pillow = _pillow()
    try:
        image = images.at(np.array([i], np.int64))[0]
        opened = pillow.fromarray(image) if isinstance(image, np.ndarray) else open_image(image)
        opened.draft("L", (8 * WIDTH, 8 * HEIGHT))  # JPEG: decodes at a fraction of the size, ten times faster
        grey = _reduce_depth(opened) if opened.mode.startswith("I") else opened.convert("L")
        small = grey.resize((WIDTH, HEIGHT), pillow.Resampling.BOX)
        return np.asarray(small, np.uint8).ravel()
    except Exception:  # Pillow's decoders raise many exceptions on damaged files
        return np.zeros(HEIGHT * WIDTH, np.uint8)


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
