"""List image files without reading them, and hash the list.

The sha256 of a data set of files has two forms. Up to `HASHED_BYTES` in total it covers every label and the content of
every file. Above that, hashing contents at each start would take minutes, so it covers every label, file name and file
size: it detects an added, missing, renamed or truncated file, but not changed pixels in a file of the same size.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mexit.core.atomic_io import sha256_file
from mexit.data.dataset import DataSet, FileImages
from mexit.errors import Damaged

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
HASHED_BYTES = 1 << 30


@dataclass(frozen=True)
class ImageFile:
    """An image file: `name` is its path below the listed folder, with "/" as separator; `size` is in bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class LabelledFiles:
    """Image files of a data set and their labels. Names are strings, because a set may have a million files.

    Attributes:
        root: folder that the names are relative to.
        names, sizes, labels: one entry per file.
    """

    root: Path
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def add(self, files: Iterable[ImageFile], label: int) -> None:
        """Append files of one class."""
        for file in files:
            self.names.append(file.name)
            self.sizes.append(file.size)
            self.labels.append(label)

    def data_set(self, name: str, classes: tuple[str, ...], n_train: int | None) -> DataSet:
        """The data set; the files after the first `n_train` are the official test part, None = there is none."""
        test = None if n_train is None else np.arange(n_train, len(self), dtype=np.int64)
        images = FileImages(self.root, self.names)
        return DataSet(name, classes, images, np.asarray(self.labels, np.int64), self.sha256(), test)

    def sha256(self, hashed_bytes: int = HASHED_BYTES) -> str:
        """Hash file contents up to `hashed_bytes` in total, else names and sizes. Raises `NotFound`, `Damaged`."""
        by_content = sum(self.sizes) <= hashed_bytes
        digest = hashlib.sha256(b"" if by_content else b"names and sizes\n")
        for name, size, label in zip(self.names, self.sizes, self.labels, strict=True):
            if by_content:
                digest.update(f"{label} {sha256_file(self.root / name)}\n".encode())
            else:
                digest.update(b"%d %d %s\n" % (label, size, os.fsencode(name)))
        return digest.hexdigest()


def list_images(root: Path, below: str = "", *, recursive: bool = True) -> list[ImageFile]:
    """The image files in the folder `root/below`, sorted by path.

    Other files, broken links and pipes are skipped.

    Raises:
        Damaged: a folder cannot be listed.
    """
    return sorted(_walk(root, below, recursive), key=lambda file: file.name.split("/"))


def list_folders(root: Path) -> list[str]:
    """Names of the subfolders, sorted, without hidden ones. Raises `Damaged`."""
    with _scan(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _walk(root: Path, below: str, recursive: bool) -> Iterator[ImageFile]:
    with _scan(root / below) as entries:
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.is_dir(follow_symlinks=False):
                if recursive:
                    yield from _walk(root, name, recursive)
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                size = _size(entry)
                if size is not None:
                    yield ImageFile(name, size)


def _size(entry: os.DirEntry[str]) -> int | None:
    """Size of a regular file in bytes; None for pipes and broken links."""
    try:
        status = entry.stat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _scan(folder: Path) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
    try:
        return os.scandir(folder)
    except OSError as error:
        raise Damaged(f"image folder {folder} cannot be listed: {error.strerror}") from None
