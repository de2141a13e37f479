"""Messages between the supervisor and a worker process, with sockets of clients.

A message is one JSON object on a line of a Unix stream socket. A message with the key `fd` carries a file descriptor.
"""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

Message = dict[str, Any]
_READ_BYTES = 1 << 16
_MAX_FDS = 64


class Channel:
    """One end of a pair of connected sockets. Any thread may send; one thread receives."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._text = b""
        self._fds: list[int] = []
        self._lock = threading.Lock()

    @staticmethod
    def pair() -> tuple[Channel, socket.socket]:
        """A channel that does not block, and the socket of its other end, for another process."""
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        mine.setblocking(False)
        return Channel(mine), theirs

    def fileno(self) -> int:
        """The file descriptor, for selectors and event loops."""
        return self._socket.fileno()

    def send(self, message: Message, fd: int | None = None) -> bool:
        """Send a message; returns False if the other end is gone or takes nothing now."""
        if fd is not None:
            message = {**message, "fd": True}
        line = json.dumps(message).encode() + b"\n"
        try:
            with self._lock:
                if fd is None:
                    self._socket.sendall(line)
                else:
                    socket.send_fds(self._socket, [line], [fd])
        except OSError:
            return False
        return True

    def receive(self) -> list[tuple[Message, int]]:
        """The messages that have arrived, each with its file descriptor or -1.

        Raises:
            EOFError: the other end is closed.
        """
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, _READ_BYTES, _MAX_FDS)
        except BlockingIOError:
            return []
        except OSError:
            raise EOFError from None
        if not data:
            raise EOFError
        self._fds += fds
        *lines, self._text = (self._text + data).split(b"\n")
        messages = [json.loads(line) for line in lines]
        return [(message, self._fds.pop(0) if message.get("fd") else -1) for message in messages]

    def close(self) -> None:
        """Close this end."""
        self._socket.close()
