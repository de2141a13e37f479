"""Load a data set by the name typed after `--data`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from mexit.core.bundle import Bundle
from mexit.core.printable import printable, shell_path
from mexit.data import cifar, digits, folder, idx, imagenet, tiny_imagenet
from mexit.data.dataset import DataSet, UnlabelledImages
from mexit.data.splits import Splits
from mexit.errors import MexitError, UsageError

_FOLDER = "folder:"
_IMAGENETS = {tiny_imagenet.NAME: tiny_imagenet.load, imagenet.NAME: imagenet.load}
NAMES = ("digits", *idx.DATA_SETS, *cifar.LAYOUTS, *_IMAGENETS)


def load(name: str, data_dir: str | Path | None = None) -> DataSet:
    """Load a data set.

    Args:
        name: one of `NAMES`, or `folder:PATH`.
        data_dir: folder of the downloaded sets; default `MEXIT_DATA`. `digits` and `folder:PATH` do not need it.

    Raises:
        UsageError: the name is unknown, or `data_dir` is needed and not given.
        NotFound, Damaged, BadInput, Untrusted: as the readers raise them.
    """
    if name == "digits":
        return digits.load()
    path = _folder(name)
    if path is not None:
        _check_storable(name)
        return folder.load(path)
    if name not in NAMES:
        hint = f"; for the folder write {shell_path(f'folder:{name}')}" if name and Path(name).is_dir() else ""
        raise UsageError(f"unknown data set '{name}': choose from {', '.join(NAMES)} or folder:PATH{hint}")
    given = data_dir or os.environ.get("MEXIT_DATA")
    if not given:
        raise UsageError(f"--data {name} needs the folder of the downloaded sets: add --data-dir, or set MEXIT_DATA")
    path = Path(given).expanduser()
    if name in _IMAGENETS:
        return _IMAGENETS[name](path)
    return cifar.load(name, path) if name in cifar.LAYOUTS else idx.load(name, path)


def data_name(text: str) -> str:
    """The name of a data set: `text` itself if it is one, else `folder:` and the path."""
    return text if text in NAMES or text.startswith(_FOLDER) else f"{_FOLDER}{text}"


def plain_name(name: str) -> str:
    """The name as data sets and runs store it: `folder:pictures` for `folder:pictures/`."""
    path = _folder(name)
    return name if path is None else f"{_FOLDER}{path}"


def load_bundle_data(bundle: Bundle, data_dir: str | Path | None = None) -> tuple[DataSet, Splits]:
    """The data set that a bundle was exported with, and its stored splits.

    Raises:
        UsageError: the bundle stores no splits, or `data_dir` is needed and not given.
        NotFound, Damaged, BadInput, Untrusted: the data set cannot be read, or was changed.
    """
    splits = Splits.of_bundle(bundle)
    data = load(splits.data_set, data_dir)
    splits.check(data)
    return data, splits


def bundle_data_is_readable(bundle: Bundle, data_dir: str | Path | None = None) -> bool:
    """Whether the data set of a bundle can be read on this machine."""
    try:
        load_bundle_data(bundle, data_dir)
    except MexitError:
        return False
    return True


def load_unlabelled(name: str) -> UnlabelledImages | None:
    """Load `folder:PATH` as images without labels; None if PATH has class folders or `name` is another set.

    Raises:
        NotFound, Damaged, BadInput: as `folder` raises them.
    """
    path = _folder(name)
    return None if path is None or folder.has_labels(path) else folder.load_unlabelled(path)


def load_any(name: str, data_dir: str | Path | None = None) -> DataSet:
    """Load images whose labels do not matter: `folder:PATH` with all its subfolders as one class, or one of `NAMES`.

    Raises:
        UsageError, NotFound, Damaged, BadInput, Untrusted: as `load` and `load_unlabelled` raise them.
    """
    path = _folder(name)
    if path is None:
        return load(name, data_dir)
    found = folder.load_unlabelled(path, recursive=True)
    return DataSet(name, ("other",), found.images, np.zeros(len(found), np.int64), found.sha256, None)


def is_folder(name: str) -> bool:
    """Whether a data set is named as `folder:PATH`."""
    return _folder(name) is not None


def _check_storable(name: str) -> None:
    """Refuse a path that settings and splits could not store. Names of the files in a folder are not stored."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"--data {printable(name)} has bytes that are not UTF-8, which settings cannot store: rename the "
            "folder, or name a link to it"
        ) from None


def _folder(name: str) -> Path | None:
    return Path(name[len(_FOLDER) :]).expanduser() if name.startswith(_FOLDER) and name != _FOLDER else None
