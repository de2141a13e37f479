"""Tiny data sets for the rehearsal, made from the embedded digits in the layouts of the real ones."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
from data_parts import pack, unpack
from numpy.typing import NDArray

from mexit.core.atomic_io import write_bytes
from mexit.data import digits
from mexit.data.cifar import LAYOUTS
from mexit.data.dataset import ArrayImages

TRAIN, TEST = 2500, 500  # pictures of each CIFAR
MNIST_TRAIN, MNIST_TEST = 600, 100
TINTS = 10
# Parts of some splits, as on the real journey.
COUNTS = {"train": None, "selection": 40, "calibration": 60, "certification": 40, "test": 40}


def write_data(data_dir: Path) -> Path:
    """Write MNIST, and pack and unpack both CIFARs, unless that was done. Returns `data_dir`."""
    if (data_dir / "complete").exists():
        return data_dir
    original = data_dir / "original"
    _write_mnist(data_dir / "mnist")
    for name in LAYOUTS:
        _write_cifar(name, original)
        for part in pack(name, original, data_dir / "parts", 2, COUNTS, effort=0):
            unpack(part, data_dir)
    (data_dir / "complete").touch()
    return data_dir


def _digits(count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Digits (count, 8, 8) and labels, repeated as often as needed."""
    data = digits.load()
    assert isinstance(data.images, ArrayImages)
    index = np.arange(count) % len(data)
    return data.images.array[index], data.labels[index]


def _write_cifar(name: str, data_dir: Path) -> None:
    """Coloured digits. CIFAR-100's class is the digit and the tint."""
    layout = LAYOUTS[name]
    grey, labels = _digits(TRAIN + TEST)
    tint = np.zeros_like(labels)
    for label in np.unique(labels):
        tint[labels == label] = np.arange((labels == label).sum()) % TINTS
    colours = np.random.default_rng(0).uniform(0.3, 1.0, (TINTS, 3))
    large = grey.repeat(4, axis=1).repeat(4, axis=2)[:, None] * colours[tint][:, :, None, None]
    pixels = large.astype(np.uint8).reshape(len(labels), -1)
    classes = [f"class {k}" for k in range(10 if name == "cifar10" else 10 * TINTS)]
    if name == "cifar100":
        labels = labels * TINTS + tint
    bounds = [*np.linspace(0, TRAIN, len(layout.train) + 1).astype(int).tolist(), TRAIN + TEST]
    for file, start, stop in zip((*layout.train, layout.test), bounds[:-1], bounds[1:], strict=True):
        batch = {"data": pixels[start:stop], layout.labels: labels[start:stop].tolist()}
        write_bytes(data_dir / layout.folder / file, pickle.dumps(batch, protocol=4))
    write_bytes(data_dir / layout.folder / layout.meta, pickle.dumps({layout.names: classes}, protocol=4))


def _write_mnist(folder: Path) -> None:
    grey, labels = _digits(MNIST_TRAIN + MNIST_TEST)
    images = np.pad(grey.repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2)))
    for name, rows in (("train", slice(0, MNIST_TRAIN)), ("t10k", slice(MNIST_TRAIN, None))):
        _write_idx(folder / f"{name}-images-idx3-ubyte.gz", images[rows])
        _write_idx(folder / f"{name}-labels-idx1-ubyte.gz", labels[rows].astype(np.uint8))


def _write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    write_bytes(path, gzip.compress(header + values.tobytes(), mtime=0))
