"""Messages to systemd about the state of the server: ready, alive, stopping.

The protocol is that of sd_notify(3): datagrams to the Unix socket that the variable `NOTIFY_SOCKET` names. systemd sets
the variable for units with `Type=notify`, and `WATCHDOG_USEC` for those with `WatchdogSec=`.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping

SOCKET, WATCHDOG_USEC, WATCHDOG_PID = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"
_BEATS = 4  # in the time of the watchdog, so that a late one does no harm
_SEND_S = 1.0

_log = logging.getLogger("mexit.server")


class SystemdNotify:
    """Tells systemd the state of one server. Every method does nothing in a process that systemd did not start.

    Attributes:
        watchdog_s: systemd restarts the server if it hears nothing for so long, seconds; None without a watchdog.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """Send nothing yet.

        Args:
            environment: the variables of the process; None: no messages.
        """
        given = environment or {}
        self._address = _address(given.get(SOCKET, ""))
        self.watchdog_s = _watchdog_s(given) if self._address else None
        self._beat_s = float("-inf")

    def ready(self, url: str) -> None:
        """Report that requests are accepted at a URL."""
        self._send(f"READY=1\nSTATUS=serving at {url}")

    def alive(self) -> None:
        """Report that the server answers. May be called often: a message is sent four times in `watchdog_s`."""
        now_s = time.monotonic()
        if self.watchdog_s is not None and now_s - self._beat_s >= self.watchdog_s / _BEATS:
            self._beat_s = now_s
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """Report that requests in flight are answered, and no new ones."""
        self._send("STOPPING=1\nSTATUS=answering the requests in flight")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(_SEND_S)
                sender.sendto(message.encode(), self._address)
        except OSError as error:  # a server without systemd's attention still serves
            _log.warning("%s cannot be sent to %s (%s)", message.partition("\n")[0], SOCKET, error)


def _address(text: str) -> str:
    """The address of systemd's socket, or "" without one; "@" begins the name of an abstract socket."""
    if not text.startswith(("/", "@")):
        if text:
            _log.warning("%s: expected a path or @NAME, found %r: systemd gets no messages", SOCKET, text)
        return ""
    return "\0" + text[1:] if text.startswith("@") else text


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    """The time of the watchdog, if it watches this process, seconds."""
    microseconds = environment.get(WATCHDOG_USEC, "")
    if not microseconds.isdecimal() or int(microseconds) == 0:
        return None
    if environment.get(WATCHDOG_PID, str(os.getpid())) != str(os.getpid()):
        return None
    return int(microseconds) / 1e6
