"""A folder of images, one subfolder a class: `PATH/<class>/*`, or `PATH/train/<class>/*` and `PATH/test/...`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from mexit.core.files import sha256_file
from mexit.core.manifest import is_class_name
from mexit.data.dataset import DataSet, FileImages
from mexit.errors import BadInput, NotFound

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
TRAIN_NAMES, TEST_NAMES = ("train",), ("test", "val")


def load(path: Path) -> DataSet:
    """List the images; they are decoded when asked for.

    Raises:
        NotFound: no such folder.
        BadInput: fewer than two class folders with images, or training and test classes that differ.
    """
    if not path.is_dir():
        raise NotFound(f"image folder {path} does not exist")
    train = next((path / name for name in TRAIN_NAMES if (path / name).is_dir()), None)
    test = next((path / name for name in TEST_NAMES if train and (path / name).is_dir()), None)
    paths, labels, classes = _list_classes(train or path)
    official_test = None
    if test is not None:
        test_paths, test_labels, test_classes = _list_classes(test)
        if test_classes != classes:
            raise BadInput(f"{train} has the classes {classes}, {test} has {test_classes}")
        official_test = np.arange(len(paths), len(paths) + len(test_paths), dtype=np.int64)
        paths, labels = paths + test_paths, labels + test_labels
    digest = hashlib.sha256()
    for file, label in zip(paths, labels, strict=True):
        digest.update(f"{label} {sha256_file(file)}\n".encode())
    return DataSet(
        f"folder:{path}",
        classes,
        FileImages(paths),
        np.asarray(labels, np.int64),
        digest.hexdigest(),
        official_test,
    )


def _list_classes(root: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    found = {folder.name: _images(folder) for folder in folders}
    found = {name: files for name, files in found.items() if files}
    for name in found:
        if not is_class_name(name):
            raise BadInput(f"{root}: the folder name {name!r} holds control characters, so it cannot name a class")
    if len(found) < 2:
        raise BadInput(
            f"{root} holds {len(found)} class folder(s) with images; at least 2 are needed, "
            f"one subfolder a class with {', '.join(SUFFIXES[:4])}, ... inside"
        )
    paths = [file for files in found.values() for file in files]
    labels = [label for label, files in enumerate(found.values()) for _ in files]
    return paths, labels, tuple(found)


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
