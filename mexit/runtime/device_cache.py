"""The device cache: measurements and engines of this device in `$MEXIT_CACHE/<model id>/<device>/`, and its key.

The default root is `~/.cache/mexit`. Facts about a device never go into a bundle. Only their owner can read them.
"""

from __future__ import annotations

import os
import platform
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from mexit.core.atomic_io import sha256_bytes, to_json, write_bytes
from mexit.core.resource_limits import processor_name, read_limits
from mexit.errors import MexitError, Untrusted, UsageError

KEY, KEY_BYTES = "device.key", 32


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
        missing.mkdir(exist_ok=True, mode=0o700)  # with `parents=True` the mode would be that of the last folder only


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


def device_key() -> bytes:
    """The secret key of this device, `$MEXIT_CACHE/device.key`, made at the first call; it signs executable files.

    Raises:
        Untrusted: others can read or replace it, or it is not a key.
        MexitError: it cannot be made or read.
    """
    path = cache_root() / KEY
    try:
        if not path.exists():
            _make_key(path)
        status = path.lstat()
        key = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
    except OSError as error:
        raise MexitError(
            f"{path} cannot be made or read ({error.strerror}): set MEXIT_CACHE to a folder that can be written"
        ) from None
    private = status.st_uid == os.getuid() and not status.st_mode & 0o077
    if not private or len(key) != KEY_BYTES:
        raise Untrusted(
            f"{path} must be a file of {KEY_BYTES} bytes that its owner alone can read, found {len(key)} bytes, "
            f"{stat.filemode(status.st_mode)}: remove it, and build engines anew with mexit export --trt --replace"
        )
    return key


def _make_key(path: Path) -> None:
    """Write a new key under a temporary name and link it: of several processes the first one wins."""
    make_private(path.parent)
    temporary = path.with_name(f".{KEY}.{secrets.token_hex(8)}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
