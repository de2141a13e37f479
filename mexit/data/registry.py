"""From what is typed after `--data` to a data set."""

from __future__ import annotations

import os
from pathlib import Path

from mexit.data import cifar, digits, folder, idx, imagenet, tiny_imagenet
from mexit.data.dataset import DataSet, Pictures
from mexit.errors import UsageError

_FILE_SETS = {tiny_imagenet.NAME: tiny_imagenet.load, imagenet.NAME: imagenet.load}
NAMES = ("digits", *idx.SETS, *cifar.SETS, *_FILE_SETS)
_FOLDER = "folder:"


def load(name: str, data_dir: str | Path | None = None) -> DataSet:
    """Load a data set.

    Args:
        name: `digits` (in the package), another of `NAMES`, or `folder:PATH`.
        data_dir: where downloaded sets lie; default `MEXIT_DATA`.

    Raises:
        UsageError: an unknown name, or a set that needs a folder and none is named.
        NotFound, Damaged, BadInput: see the readers.
    """
    if name == "digits":
        return digits.load()
    path = _folder(name)
    if path is not None:
        return folder.load(path)
    if name not in NAMES:
        raise UsageError(f"unknown data set '{name}': choose from {', '.join(NAMES)} or folder:PATH")
    where = data_dir or os.environ.get("MEXIT_DATA")
    if not where:
        raise UsageError(f"--data {name} needs the folder it lies in: add --data-dir DIR, or set MEXIT_DATA")
    path = Path(where).expanduser()
    if name in _FILE_SETS:
        return _FILE_SETS[name](path)
    return cifar.load(name, path) if name in cifar.SETS else idx.load(name, path)


def load_pictures(name: str) -> Pictures | None:
    """The pictures of `folder:PATH` where PATH has no class folders; None for every other set.

    Raises:
        NotFound, Damaged: see `folder`.
    """
    path = _folder(name)
    return None if path is None or folder.has_labels(path) else folder.load_pictures(path)


def _folder(name: str) -> Path | None:
    return Path(name[len(_FOLDER) :]).expanduser() if name.startswith(_FOLDER) and name != _FOLDER else None
