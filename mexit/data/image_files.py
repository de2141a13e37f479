"""List image files without reading them, and hash the list.

The sha256 of a data set of files has two forms. Up to `HASHED_BYTES` in total it covers every label and the content of
every file. Above that, hashing contents at each start would take minutes, so it covers every label, file name and file
size: it detects an added, missing, renamed or truncated file, but not changed pixels in a file of the same size.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mexit.core.atomic_io import sha256_file
from mexit.data.dataset import DataSet, FileImages
from mexit.data.image_formats import HEAD_BYTES, SUFFIXES, is_picture
from mexit.errors import Damaged

HASHED_BYTES = 1 << 30
# What file managers, archives and network drives leave in folders, in lower case; names with a leading dot are hidden.
SYSTEM_NAMES = (
    *("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
)
# Keys of the counts of skipped entries, beside suffixes such as ".txt".
HIDDEN, NO_SUFFIX, BROKEN_LINK, SPECIAL = "hidden or system entry", "no suffix", "broken link", "not a regular file"
LISTED_LINK = "linked folder that is listed already"
_MAX_SUFFIX = 12


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

    def data_set(
        self,
        name: str,
        classes: tuple[str, ...],
        n_train: int | None,
        n_val: int = 0,
        skipped: Mapping[str, int] | None = None,
    ) -> DataSet:
        """The data set of the listed files.

        Args:
            name, classes: as `DataSet` defines them.
            n_train: number of files before the official parts; None = there is no official part.
            n_val: number of files after those that are the official validation part; the rest is the test part.
            skipped: counts of entries that are no images of the set, by suffix or reason.
        """
        val = test = None
        if n_train is not None:
            test = np.arange(n_train + n_val, len(self), dtype=np.int64)
            val = np.arange(n_train, n_train + n_val, dtype=np.int64) if n_val else None
        images, labels = FileImages(self.root, self.names), np.asarray(self.labels, np.int64)
        return DataSet(name, classes, images, labels, self.sha256(), test, val, dict(skipped or {}))

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


def list_images(
    root: Path, below: str = "", *, recursive: bool = True, skipped: Counter[str] | None = None
) -> list[ImageFile]:
    """The image files in the folder `root/below`, sorted by path.

    A file is an image by its suffix, or else by its first bytes. Hidden and system entries, other files, broken links
    and pipes are skipped. Links to folders are followed, each folder once.

    Args:
        root: folder that the names are relative to.
        below: path of the listed folder below `root`, "" = `root`.
        recursive: whether to list subfolders too.
        skipped: counts skipped entries by suffix or reason.

    Raises:
        Damaged: a folder cannot be listed.
    """
    walk = _Walk(root, recursive, Counter() if skipped is None else skipped)
    return sorted(walk.images(below), key=lambda file: file.name.split("/"))


def has_images(root: Path, below: str = "", *, recursive: bool = True) -> bool:
    """Whether `list_images` finds an image. Raises `Damaged`."""
    return any(True for _ in _Walk(root, recursive, Counter()).images(below))


def list_folders(root: Path) -> list[str]:
    """Names of the subfolders, sorted, without hidden ones and links to `root` or above. Raises `Damaged`."""
    real = root.resolve()
    above = {_key(folder) for folder in (real, *real.parents)}
    with _scan(root) as entries:
        folders = [entry for entry in entries if _is_folder(entry) and not is_hidden(entry.name)]
        return sorted(entry.name for entry in folders if not entry.is_symlink() or _key(Path(entry.path)) not in above)


def is_hidden(name: str) -> bool:
    """Whether a file or folder name is hidden, or one that systems create."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


@dataclass
class _Walk:
    """One listing of a folder; `seen` are the folders that it must not enter, by device and inode."""

    root: Path
    recursive: bool
    skipped: Counter[str]
    seen: set[tuple[int, int]] = field(default_factory=set)

    def images(self, below: str) -> Iterator[ImageFile]:
        """The images in `root/below`. A link to a folder above them is a cycle, which is not followed."""
        real = (self.root / below).resolve()
        self.seen.update(_key(folder) for folder in (real, *real.parents))
        yield from self._images(below)

    def _images(self, below: str) -> Iterator[ImageFile]:
        folders: list[tuple[bool, str]] = []
        with _scan(self.root / below) as entries:
            for entry in entries:
                name = f"{below}/{entry.name}" if below else entry.name
                if is_hidden(entry.name):
                    self.skipped[HIDDEN] += 1
                elif _is_folder(entry):
                    folders.append((entry.is_symlink(), name))
                else:
                    size = self._image_size(entry)
                    if size is not None:
                        yield ImageFile(name, size)
        for _, name in sorted(folders) if self.recursive else ():  # links last: a folder keeps its own path
            key = _key(self.root / name)
            if key in self.seen:
                self.skipped[LISTED_LINK] += 1
                continue
            self.seen.add(key)
            yield from self._images(name)

    def _image_size(self, entry: os.DirEntry[str]) -> int | None:
        """Size of an image file in bytes; None for anything else, which is counted."""
        try:
            status = entry.stat()
        except OSError:
            self.skipped[BROKEN_LINK] += 1
            return None
        suffix = os.path.splitext(entry.name)[1].lower()
        if not stat.S_ISREG(status.st_mode):
            self.skipped[SPECIAL] += 1
        elif suffix in SUFFIXES or is_picture(_head(entry.path)):
            return status.st_size
        else:
            self.skipped[suffix if 1 < len(suffix) <= _MAX_SUFFIX else NO_SUFFIX] += 1
        return None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _head(path: str) -> bytes:
    """The first bytes of a file; none if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""


def _key(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError as error:
        raise Damaged(f"image folder {folder} cannot be listed: {error.strerror}") from None
    return status.st_dev, status.st_ino


def _scan(folder: Path) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
    try:
        return os.scandir(folder)
    except OSError as error:
        raise Damaged(f"image folder {folder} cannot be listed: {error.strerror}") from None
