"""Data sets of image files: listed at once, read and decoded when asked for.

The hash of such a set has two forms. Up to `CONTENT_BYTES` in all it covers every label and the content of every
file. Above that, reading everything at each start would take minutes, so it covers every label with the name and
the size of the file: a file that was added, lost, renamed or cut short is noticed, changed pixels of the same size
are not.
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
CONTENT_BYTES = 1 << 30


@dataclass(frozen=True)
class Picture:
    """An image file: its path below the folder that is listed, with "/" between the parts, and its bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class Listing:
    """Labelled files below one folder; text instead of `Path` objects, because a set may have a million files.

    Attributes:
        root: what the names are relative to.
        names, sizes, labels: one entry a file.
    """

    root: Path
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def add(self, pictures: Iterable[Picture], label: int) -> None:
        """Append files of one class."""
        for picture in pictures:
            self.names.append(picture.name)
            self.sizes.append(picture.size)
            self.labels.append(label)

    def data_set(self, name: str, classes: tuple[str, ...], training: int | None) -> DataSet:
        """The data set; the files after the first `training` are the official test part (None: there is none)."""
        test = None if training is None else np.arange(training, len(self), dtype=np.int64)
        images = FileImages(self.root, self.names)
        return DataSet(name, classes, images, np.asarray(self.labels, np.int64), self.digest(), test)

    def digest(self, content_bytes: int = CONTENT_BYTES) -> str:
        """sha256 of the set, in the form that its size asks for; see the module. Raises `NotFound`, `Damaged`."""
        by_content = sum(self.sizes) <= content_bytes
        digest = hashlib.sha256(b"" if by_content else b"names and sizes\n")
        for name, size, label in zip(self.names, self.sizes, self.labels, strict=True):
            if by_content:
                digest.update(f"{label} {sha256_file(self.root / name)}\n".encode())
            else:
                digest.update(b"%d %d %s\n" % (label, size, os.fsencode(name)))
        return digest.hexdigest()


def pictures(root: Path, below: str = "", *, deep: bool = True) -> list[Picture]:
    """The image files in the folder `root/below`, in the order of their paths.

    Files of other kinds, links to nowhere and pipes are passed over; `deep` looks into subfolders too.

    Raises:
        Damaged: a folder that cannot be listed.
    """
    return sorted(_walk(root, below, deep), key=lambda picture: picture.name.split("/"))


def folders(root: Path) -> list[str]:
    """Names of the subfolders, sorted; hidden ones are passed over. Raises `Damaged`."""
    with _entries(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _walk(root: Path, below: str, deep: bool) -> Iterator[Picture]:
    with _entries(root / below) as entries:
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.is_dir(follow_symlinks=False):
                if deep:
                    yield from _walk(root, name, deep)
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                size = _size(entry)
                if size is not None:
                    yield Picture(name, size)


def _size(entry: os.DirEntry[str]) -> int | None:
    """Bytes of a file; None for pipes and for links that lead nowhere."""
    try:
        found = entry.stat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _entries(folder: Path) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
    try:
        return os.scandir(folder)
    except OSError as error:
        raise Damaged(f"image folder {folder} cannot be listed: {error.strerror}") from None
