"""The device cache: measurements and engines of this device, in `$MEXIT_CACHE/<model id>/<device>/`.

The default root is `~/.cache/mexit`. Facts about a device never go into a bundle. Only their owner can read them.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from mexit.core.atomic_io import sha256_bytes, to_json, write_bytes
from mexit.core.resource_limits import processor_name, read_limits
from mexit.errors import MexitError, UsageError


def cache_root() -> Path:
    """`$MEXIT_CACHE`, else `~/.cache/mexit`. Raises `UsageError` without a home directory."""
    root = os.environ.get("MEXIT_CACHE")
    try:
        return Path(root) if root else Path.home() / ".cache" / "mexit"
    except RuntimeError:
        raise UsageError(
            "this user has no home directory to keep facts of this device in: set MEXIT_CACHE to a folder"
        ) from None


def cache_folder(model: str) -> Path:
    """The folder for facts about the model with this id on this device. Raises `UsageError` as `cache_root` does."""
    device = f"{platform.machine()} {processor_name()} {read_limits().threads}"
    return cache_root() / model[:32] / sha256_bytes(device.encode())[:16]


def make_private(folder: Path) -> None:
    """Make `cache_root()` or a folder below it; every new folder has mode 0700. Raises `OSError`."""
    root = cache_root()
    root.parent.mkdir(parents=True, exist_ok=True)
    parents = [root / part for part in folder.relative_to(root).parents][::-1]
    for missing in (*parents, folder):
        missing.mkdir(
            exist_ok=True, mode=0o700
        )  # with `parents=True` the mode would be that of the last folder only


def write_fact(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically and readable by its owner alone.

    Args:
        path: a file in `cache_folder(...)`.
        value: anything that JSON can hold.

    Raises:
        MexitError: the folder cannot be written.
    """
    try:
        make_private(path.parent)
    except OSError as error:
        raise MexitError(
            f"{path.parent} cannot be made ({error.strerror}): set MEXIT_CACHE to a folder that can be written"
        ) from None
    write_bytes(path, to_json(value))
