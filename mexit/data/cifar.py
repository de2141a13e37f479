"""CIFAR-10 and CIFAR-100 from their original python batches, without running what a pickle may hold.

A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009. A batch is a pickled dictionary of a
uint8 array (N, 3072), red, green and blue planes of 32x32 pixels, and a list of labels. A pickle names the
functions that rebuild it; here only those of a plain numpy array are known, and stand-ins of our own take their
place, so that no file drives numpy, let alone anything else.
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
from mexit.data.dataset import ArrayImages, DataSet
from mexit.errors import Damaged, NotFound, Untrusted

MAX_BYTES = 512 << 20
SIDE = 32


@dataclass(frozen=True)
class Layout:
    """The files of one data set and the keys inside them."""

    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    names: str
    labels: str


SETS = {
    "cifar10": Layout(
        "cifar-10-batches-py", tuple(f"data_batch_{k}" for k in range(1, 6)), "test_batch",
        "batches.meta", "label_names", "labels",
    ),
    "cifar100": Layout(
        "cifar-100-python", ("train",), "test", "meta", "fine_label_names", "fine_labels",
    ),
}  # fmt: skip


def load(name: str, data_dir: Path) -> DataSet:
    """Read `cifar10` or `cifar100` (its 100 fine classes) below `data_dir`.

    Raises:
        NotFound: a file is not there; names the folders that were searched.
        Damaged: a file is not what it should be.
        Untrusted: a file asks for more than plain arrays and containers.
    """
    layout = SETS[name]
    folder = _find_folder(name, data_dir, layout)
    classes = _class_names(folder / layout.meta, layout.names)
    parts = [_load_batch(folder / file, layout.labels, len(classes)) for file in (*layout.train, layout.test)]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    digest = hashlib.sha256(images.data)  # no copy of 184 MB
    digest.update(labels.data)
    test = np.arange(len(labels) - len(parts[-1][1]), len(labels), dtype=np.int64)
    return DataSet(name, classes, ArrayImages(images), labels, digest.hexdigest(), test)


def read_pickle(path: Path) -> dict[str, Any]:
    """A pickled dictionary of plain containers, numbers, text and arrays of unsigned bytes.

    Raises:
        Untrusted: it names anything else than a numpy array.
        Damaged: it is no such pickle.
    """
    content = read_bytes(path, "data file", MAX_BYTES)
    try:
        # Written by Python 2: its byte strings, pixels among them, come as latin-1 text.
        value = _Plain(io.BytesIO(content), encoding="latin1").load()
    except Untrusted as error:
        raise Untrusted(f"data file {path} {error}") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise Damaged(f"data file {path} is no readable batch: {error or type(error).__name__}") from None
    if not isinstance(value, dict):
        raise Damaged(f"data file {path} holds a {type(value).__name__}, not a dictionary")
    return value


class _Plain(pickle.Unpickler):
    """An unpickler whose every name is one of ours."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise Untrusted(
                f"asks for {module}.{name}: only numpy arrays, containers, numbers and text are read, "
                "because unpickling anything else could run code"
            ) from None

    def persistent_load(self, _: Any) -> Any:
        raise Untrusted("refers to objects outside itself")


class _Array:
    """Stands in for numpy.ndarray: keeps the state of an array of unsigned bytes, and checks it."""

    values: NDArray[np.uint8]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, content = state
        raw = content.encode("latin1") if isinstance(content, str) else content
        if not isinstance(kind, _Kind) or kind.code not in ("u1", "|u1") or fortran or not isinstance(raw, bytes):
            raise ValueError("it holds an array of another kind than unsigned bytes")
        self.values = np.frombuffer(raw, np.uint8).reshape(shape)


class _Kind:
    """Stands in for numpy.dtype; what the pickle says of byte order does not matter for bytes."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


def _reconstruct(*_: Any) -> _Array:
    """Stands in for numpy's function of that name, which makes an empty array."""
    return _Array()


def _encode(text: str, *_: Any) -> bytes:
    """Stands in for `codecs.encode`, through which Python 3 writes bytes for Python 2."""
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,
}


def _find_folder(name: str, data_dir: Path, layout: Layout) -> Path:
    searched = [data_dir / layout.folder, data_dir]
    for folder in searched:
        if (folder / layout.meta).is_file():
            return folder
    files = ", ".join((*layout.train, layout.test, layout.meta))
    raise NotFound(
        f"no {name} in {searched[0]} or {searched[1]}: its python batches ({files}) belong in one of these; "
        "--data-dir or MEXIT_DATA names the folder"
    )


def _class_names(path: Path, key: str) -> tuple[str, ...]:
    names = read_pickle(path).get(key)
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) and name for name in names):
        raise Damaged(f"data file {path} has no list '{key}' of class names")
    return tuple(names)


def _load_batch(path: Path, key: str, classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, 32, 32, 3) and labels (N,) of one batch."""
    batch = read_pickle(path)
    data, labels = batch.get("data"), batch.get(key)
    pixels = getattr(data, "values", None) if isinstance(data, _Array) else None
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != 3 * SIDE * SIDE:
        raise Damaged(f"data file {path} has no array 'data' of unsigned bytes (N, {3 * SIDE * SIDE})")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not labels:
        found = len(labels) if isinstance(labels, list) else "no"
        raise Damaged(f"data file {path} holds {len(pixels)} images and {found} labels under '{key}'")
    if not all(type(label) is int and 0 <= label < classes for label in labels):
        raise Damaged(f"data file {path} has a label that is none of the {classes} classes 0 to {classes - 1}")
    images = np.ascontiguousarray(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
    return images, np.asarray(labels, np.int64)
