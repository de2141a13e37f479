"""MNIST and Fashion-MNIST from their original IDX files, gzipped or not.

The format (Y. LeCun): two zero bytes, the type (8 = unsigned byte), the number of dimensions, each size as
four big-endian bytes, then the values.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mexit.core.atomic_io import read_bytes, sha256_bytes
from mexit.data.dataset import ArrayImages, DataSet
from mexit.errors import Damaged, NotFound

MAX_BYTES = 512 << 20
DIGITS = tuple(str(digit) for digit in range(10))
CLOTHES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
SETS = {
    "mnist": (("mnist", "MNIST/raw", "."), DIGITS),
    "fashion-mnist": (("fashion-mnist", "FashionMNIST/raw", "."), CLOTHES),
}
PARTS = (("train-images", "train-labels"), ("t10k-images", "t10k-labels"))


def load(name: str, data_dir: Path) -> DataSet:
    """Read `mnist` or `fashion-mnist` below `data_dir`.

    Raises:
        NotFound: the four files are not there; names the folders that were searched.
        Damaged: a file is cut short, no IDX file, or images and labels do not match.
    """
    folders, classes = SETS[name]
    folder = _find_folder(name, data_dir, folders)
    parts = [_load_part(folder, *names) for names in PARTS]
    labels = np.concatenate([part[1] for part in parts]).astype(np.int64)
    if parts[0][0].shape[1:] != parts[1][0].shape[1:]:
        sizes = " and ".join(str(part[0].shape[1:]) for part in parts)
        raise Damaged(f"{folder}: training and test images differ in size, {sizes}")
    images = np.concatenate([part[0] for part in parts])
    if labels.max() >= len(classes):
        raise Damaged(f"{folder}: labels go up to {labels.max()}, {len(classes)} classes are expected")
    test = np.arange(len(parts[0][1]), len(labels), dtype=np.int64)
    return DataSet(
        name, classes, ArrayImages(images), labels, sha256_bytes(images.tobytes() + labels.tobytes()), test
    )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """One IDX file of unsigned bytes as an array. Raises `Damaged` naming the file and what is wrong."""
    content = _read(path)
    if len(content) < 4 or content[:3] != b"\0\0\x08" or not 1 <= content[3] <= 3:
        raise Damaged(f"data file {path} is no IDX file of unsigned bytes (it begins with {content[:4].hex()})")
    dimensions = content[3]
    head = 4 + 4 * dimensions
    if len(content) < head:
        raise Damaged(f"data file {path} is cut short within its header")
    shape = struct.unpack(f">{dimensions}I", content[4:head])
    expected = int(np.prod(shape, dtype=object))
    if len(content) - head != expected:
        raise Damaged(f"data file {path} announces {expected} values and holds {len(content) - head}")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def _load_part(folder: Path, images_name: str, labels_name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    images_path, labels_path = _find_file(folder, images_name), _find_file(folder, labels_name)
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
        raise Damaged(f"{images_path} holds {images.shape} and {labels_path} {labels.shape}: they do not match")
    return images, labels


def _find_folder(name: str, data_dir: Path, folders: tuple[str, ...]) -> Path:
    for folder in folders:
        if any((data_dir / folder).glob("train-images*idx3-ubyte*")):
            return data_dir / folder
    searched = ", ".join(str(data_dir / folder) for folder in folders)
    raise NotFound(
        f"no {name} in {searched}: its four IDX files (train-images-idx3-ubyte.gz, ...) belong in one of these; "
        "--data-dir or MEXIT_DATA names the folder"
    )


def _find_file(folder: Path, name: str) -> Path:
    found = sorted(folder.glob(f"{name}*ubyte*"))
    if not found:
        raise NotFound(f"data file {folder / name}-idx*-ubyte(.gz) does not exist")
    return found[0]


def _read(path: Path) -> bytes:
    content = read_bytes(path, "data file", MAX_BYTES)
    if path.suffix != ".gz":
        return content
    try:
        engine = zlib.decompressobj(16 + zlib.MAX_WBITS)
        plain = engine.decompress(content, MAX_BYTES)
    except (zlib.error, gzip.BadGzipFile) as error:
        raise Damaged(f"data file {path} is no gzip file: {error}") from None
    if not engine.eof:
        raise Damaged(f"data file {path} is cut short, or holds more than {MAX_BYTES} bytes")
    if engine.unused_data:
        raise Damaged(f"data file {path} holds {len(engine.unused_data)} bytes after its gzip data")
    return plain
