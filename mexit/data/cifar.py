"""Read CIFAR-10 and CIFAR-100 from their original python batches, without executing code in them.

A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009. A batch is a pickled dictionary with a uint8
array (N, 3072), the red, green and blue planes of 32 x 32 pixels, and a list of labels. A pickle can name any function
to call. The unpickler here accepts the few names that a numpy array needs, and maps them to stand-ins of its own.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.atomic_io import read_bytes
from mexit.data.dataset import ArrayImages, DataSet, find_folder
from mexit.errors import Damaged, Untrusted

MAX_BYTES = 512 << 20
SIDE = 32


@dataclass(frozen=True)
class Layout:
    """The files of one data set; `names` and `labels` are keys inside them."""

    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    names: str
    labels: str


LAYOUTS = {
    "cifar10": Layout(
        "cifar-10-batches-py", tuple(f"data_batch_{k}" for k in range(1, 6)), "test_batch",
        "batches.meta", "label_names", "labels",
    ),
    "cifar100": Layout(
        "cifar-100-python", ("train",), "test", "meta", "fine_label_names", "fine_labels",
    ),
}  # fmt: skip


def load(name: str, data_dir: Path) -> DataSet:
    """Read `cifar10`, or `cifar100` with its 100 fine classes, below `data_dir`.

    Raises:
        NotFound: a file does not exist; the message names it, or the folders that were searched.
        Damaged: a file is not a batch.
        Untrusted: a file refers to more than arrays, containers, numbers and text.
    """
    layout = LAYOUTS[name]
    files = ", ".join((*layout.train, layout.test, layout.meta))
    candidates = [data_dir / layout.folder, data_dir]
    folder = find_folder(name, candidates, lambda path: (path / layout.meta).is_file(), f"its python batches ({files})")
    classes = _read_class_names(folder / layout.meta, layout.names)
    batches = [_read_batch(folder / file, layout.labels, len(classes)) for file in (*layout.train, layout.test)]
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    digest = hashlib.sha256(images.data)  # without a copy of 184 MB
    digest.update(labels.data)
    test = np.arange(len(labels) - len(batches[-1][1]), len(labels), dtype=np.int64)
    return DataSet(name, classes, ArrayImages(images), labels, digest.hexdigest(), test)


def read_pickle(path: Path) -> dict[str, Any]:
    """Read a pickled dictionary of containers, numbers, text and uint8 arrays (as `PickledArray`).

    Raises:
        NotFound: the file does not exist.
        Untrusted: the pickle refers to anything else.
        Damaged: the file is not such a pickle, or too large.
    """
    content = read_bytes(path, "data file", MAX_BYTES)
    try:
        # Byte strings of Python 2, such as the pixels, are decoded as latin-1 text.
        value = _RestrictedUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Untrusted as error:
        raise Untrusted(f"data file {path} {error}") from None
    except Exception as error:  # a damaged pickle raises almost any exception
        raise Damaged(f"data file {path} is not a readable batch: {error or type(error).__name__}") from None
    if not isinstance(value, dict):
        raise Damaged(f"data file {path} holds a {type(value).__name__}, expected a dictionary")
    return value


class PickledArray:
    """Stand-in for `numpy.ndarray` that accepts uint8 arrays only; `values` is the array."""

    values: NDArray[np.uint8]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        raw = content.encode("latin1") if isinstance(content, str) else content
        is_uint8 = isinstance(dtype, _Dtype) and dtype.code in ("u1", "|u1")
        if not is_uint8 or fortran or not isinstance(raw, bytes):
            raise ValueError("it holds an array that is not uint8 in C order")
        self.values = np.frombuffer(raw, np.uint8).reshape(shape)


class _Dtype:
    """Stand-in for `numpy.dtype`. Its state is the byte order, which does not matter for uint8."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


def _reconstruct(*_: Any) -> PickledArray:
    """Stand-in for numpy's function of that name, which creates an empty array."""
    return PickledArray()


def _encode(text: str, *_: Any) -> bytes:
    """Stand-in for `codecs.encode`, with which Python 3 pickles bytes for Python 2."""
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,
}


class _RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that resolves the names in `_STAND_INS` only."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise Untrusted(
                f"refers to {module}.{name}: only numpy arrays, containers, numbers and text are read, because "
                "unpickling anything else could run code"
            ) from None

    def persistent_load(self, _: Any) -> Any:
        raise Untrusted("refers to objects outside itself")


def _read_class_names(path: Path, key: str) -> tuple[str, ...]:
    names = read_pickle(path).get(key)
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) and name for name in names):
        raise Damaged(f"data file {path} has no list '{key}' of class names")
    return tuple(names)


def _read_batch(path: Path, key: str, classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, 32, 32, 3) and labels (N,) of one batch."""
    batch = read_pickle(path)
    data, labels = batch.get("data"), batch.get(key)
    pixels = getattr(data, "values", None) if isinstance(data, PickledArray) else None
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != 3 * SIDE * SIDE:
        raise Damaged(f"data file {path} has no uint8 array 'data' (N, {3 * SIDE * SIDE})")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not labels:
        count = len(labels) if isinstance(labels, list) else "no"
        raise Damaged(f"data file {path} holds {len(pixels)} images and {count} labels under '{key}'")
    if not all(type(label) is int and 0 <= label < classes for label in labels):
        raise Damaged(f"data file {path} has a label outside the {classes} classes 0 to {classes - 1}")
    images = np.ascontiguousarray(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
    return images, np.asarray(labels, np.int64)
