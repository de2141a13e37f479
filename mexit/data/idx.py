"""Read MNIST and Fashion-MNIST from their IDX files, gzipped or not.

The IDX format (Y. LeCun): two zero bytes, the type (8 = unsigned byte), the number of dimensions, each size as
four big-endian bytes, then the values.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mexit.core.atomic_io import read_bytes, sha256_bytes
from mexit.data.dataset import ArrayImages, DataSet, find_folder
from mexit.errors import Damaged, NotFound

MAX_BYTES = 512 << 20
DIGITS = tuple(str(digit) for digit in range(10))
CLOTHES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
# Name to the folders that are searched and the classes.
DATA_SETS = {
    "mnist": (("mnist", "MNIST/raw", "."), DIGITS),
    "fashion-mnist": (("fashion-mnist", "FashionMNIST/raw", "."), CLOTHES),
}
PARTS = (("train-images", "train-labels"), ("t10k-images", "t10k-labels"))


def load(name: str, data_dir: Path) -> DataSet:
    """Read `mnist` or `fashion-mnist` below `data_dir`.

    Raises:
        NotFound: a file does not exist; the message names it, or the folders that were searched.
        Damaged: a file is truncated or not an IDX file, or images and labels do not match.
    """
    folders, classes = DATA_SETS[name]
    folder = find_folder(
        name,
        [data_dir / folder for folder in folders],
        lambda path: any(path.glob("train-images*idx3-ubyte*")),
        "its four IDX files (train-images-idx3-ubyte.gz, ...)",
    )
    (train_images, train_labels), (test_images, test_labels) = (_read_part(folder, *names) for names in PARTS)
    if train_images.shape[1:] != test_images.shape[1:]:
        raise Damaged(
            f"{folder}: training and test images have different sizes, {train_images.shape[1:]} and "
            f"{test_images.shape[1:]}"
        )
    images = np.concatenate([train_images, test_images])
    labels = np.concatenate([train_labels, test_labels]).astype(np.int64)
    if labels.max() >= len(classes):
        raise Damaged(f"{folder}: labels go up to {labels.max()}, expected {len(classes)} classes from 0")
    test = np.arange(len(train_labels), len(labels), dtype=np.int64)
    sha256 = sha256_bytes(images.tobytes() + labels.tobytes())
    return DataSet(name, classes, ArrayImages(images), labels, sha256, test)


def read_idx(path: Path, max_bytes: int = MAX_BYTES) -> NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes with 1 to 3 dimensions.

    Args:
        path: gzipped if its suffix is .gz.
        max_bytes: limit of the file and of its unzipped content.

    Raises:
        NotFound: the file does not exist.
        Damaged: it is not such a file, truncated, or too large.
    """
    content = _read(path, max_bytes)
    if len(content) < 4 or content[:3] != b"\0\0\x08" or not 1 <= content[3] <= 3:
        raise Damaged(f"data file {path} is not an IDX file of unsigned bytes (it begins with {content[:4].hex()})")
    dimensions = content[3]
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise Damaged(f"data file {path} is truncated within its header")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    expected = int(np.prod(shape, dtype=object))
    if len(content) - header != expected:
        raise Damaged(f"data file {path} announces {expected} values and holds {len(content) - header}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_part(folder: Path, images_name: str, labels_name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    images_path, labels_path = _find_file(folder, images_name), _find_file(folder, labels_name)
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
        raise Damaged(f"{images_path} {images.shape} and {labels_path} {labels.shape} do not match")
    return images, labels


def _find_file(folder: Path, name: str) -> Path:
    matches = sorted(folder.glob(f"{name}*ubyte*"))
    if not matches:
        raise NotFound(f"data file {folder / name}-idx*-ubyte(.gz) does not exist")
    return matches[0]


def _read(path: Path, max_bytes: int) -> bytes:
    content = read_bytes(path, "data file", max_bytes)
    if path.suffix != ".gz":
        return content
    try:
        unzip = zlib.decompressobj(16 + zlib.MAX_WBITS)
        plain = unzip.decompress(content, max_bytes)
    except zlib.error as error:
        raise Damaged(f"data file {path} is not a gzip file: {error}") from None
    if not unzip.eof:
        raise Damaged(f"data file {path} is truncated, or unzips to more than {max_bytes} bytes")
    if unzip.unused_data:
        raise Damaged(f"data file {path} has {len(unzip.unused_data)} bytes after its gzip data")
    return plain
