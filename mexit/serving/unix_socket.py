"""Unix sockets to listen on (`--host unix:PATH`)."""

from __future__ import annotations

import socket
import stat
from contextlib import suppress
from pathlib import Path

from mexit.errors import UsageError

PREFIX = "unix:"
_MODES = 0o660  # of the owner and the group; connecting takes the permission to write


class UnixSocket(socket.socket):
    """A bound Unix socket, whose file is removed when the socket is closed."""

    def __init__(self, path: Path) -> None:
        """Bind a socket, which does not listen yet.

        The file of a server that has been killed is replaced. The owner may connect, and the group if the umask
        lets it write.

        Raises:
            UsageError: another server listens there, or the path is no place for a socket.
        """
        if not hasattr(socket, "AF_UNIX"):
            raise UsageError(f"this system has no Unix sockets: use --host 127.0.0.1 in place of {PREFIX}{path}")
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self._path, self._inode = path.absolute(), 0
        try:
            _remove_leftover(self._path)
            self.bind(str(self._path))
            state = self._path.stat()
            self._inode = state.st_ino
            self._path.chmod(stat.S_IMODE(state.st_mode) & _MODES)
        except OSError as error:
            self.close()
            reason = error.strerror or error  # a path of more than about 100 bytes has no error number
            raise UsageError(f"cannot listen on {PREFIX}{path} ({reason}): choose a short path in a folder that you "
                             "may write") from None  # fmt: skip
        except UsageError:
            self.close()
            raise

    def close(self) -> None:
        """Close the socket and remove its file, unless another server has replaced it."""
        inode, self._inode = self._inode, 0
        with suppress(OSError):
            if inode and self._path.stat().st_ino == inode:
                self._path.unlink()
        super().close()


def _remove_leftover(path: Path) -> None:
    """Remove the file of a Unix socket on which no server listens."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"{path} exists and is no socket: choose another path for --host {PREFIX}PATH")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
    raise UsageError(f"a server listens on {path} already: choose another path for --host {PREFIX}PATH")
