"""From what is typed after `--data` to a data set."""

from __future__ import annotations

import os
from pathlib import Path

from mexit.data import cifar, digits, folder, idx
from mexit.data.dataset import DataSet
from mexit.errors import UsageError

NAMES = ("digits", *idx.SETS, *cifar.SETS)
_FOLDER = "folder:"


def load(name: str, data_dir: str | Path | None = None) -> DataSet:
    """Load a data set.

    Args:
        name: `digits` (in the package), `mnist`, `fashion-mnist`, `cifar10`, `cifar100`, or `folder:PATH`.
        data_dir: where downloaded sets lie; default `MEXIT_DATA`.

    Raises:
        UsageError: an unknown name, or a set that needs a folder and none is named.
        NotFound, Damaged, BadInput: see the readers.
    """
    if name == "digits":
        return digits.load()
    if name.startswith(_FOLDER) and len(name) > len(_FOLDER):
        return folder.load(Path(name[len(_FOLDER) :]).expanduser())
    if name not in NAMES:
        raise UsageError(f"unknown data set '{name}': choose from {', '.join(NAMES)} or folder:PATH")
    where = data_dir or os.environ.get("MEXIT_DATA")
    if not where:
        raise UsageError(f"--data {name} needs the folder it lies in: add --data-dir DIR, or set MEXIT_DATA")
    path = Path(where).expanduser()
    return cifar.load(name, path) if name in cifar.SETS else idx.load(name, path)
