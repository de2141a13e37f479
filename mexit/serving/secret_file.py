"""Files that hold a secret: keys and tokens."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mexit.errors import NotFound, UsageError

_MAX_BYTES = 1 << 20
_OTHER_USERS, _OTHER_USERS_OF_ROOT = 0o077, 0o027  # a group may read a file of root, as PostgreSQL allows


def read_secret(path: Path, what: str) -> bytes:
    """The content of a file that other users can neither read nor change.

    Args:
        path: of the file.
        what: what the file holds, for messages.

    Raises:
        NotFound: there is no such file.
        UsageError: the file cannot be read, is too long, or is open to other users.
    """
    check_secret(path, what)
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{what} in {path} cannot be read ({error.strerror})") from None
    if len(content) > _MAX_BYTES:
        raise UsageError(f"{what} in {path}: expected at most {_MAX_BYTES} bytes")
    return content


def check_secret(path: Path, what: str) -> None:
    """Check that a file exists and is not open to other users. Errors as `read_secret`."""
    try:
        state = path.stat()
    except OSError:
        raise NotFound(f"{what}: there is no file {path}") from None
    if not stat.S_ISREG(state.st_mode):
        raise UsageError(f"{what}: {path} is not a file")
    if os.name != "posix":
        return
    mode, by_root = stat.S_IMODE(state.st_mode), state.st_uid == 0
    if mode & (_OTHER_USERS_OF_ROOT if by_root else _OTHER_USERS):
        fix = f"chmod {640 if by_root else 600} {path}"
        raise UsageError(f"{what}: other users can read or change {path} (mode {mode:03o}): {fix}")
