"""A worker process as the supervisor sees it."""

from __future__ import annotations

import socket
import subprocess
import time
from collections import deque
from collections.abc import Sequence

from mexit.serving.channel import Channel, Message


class WorkerProcess:
    """A worker process as the supervisor sees it.

    Attributes:
        index: number of the worker, from 0.
        ready: whether it answers requests.
        idle: whether it has no request in flight; reported after a stop signal.
        open: its open connections.
        passed: connections that it was sent and has not taken yet; if it dies, another worker gets them.
        heard_s: when it sent its last message, by `time.monotonic`.
    """

    def __init__(self, index: int, command: Sequence[str], environment: dict[str, str], start: Message) -> None:
        self.index = index
        self.ready = self.idle = False
        self.open = 0
        self.passed: deque[socket.socket] = deque()
        self.heard_s = time.monotonic()
        self.channel, theirs = Channel.pair()
        with theirs:
            self.process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal reaches the supervisor alone
            )
        self.channel.send({**start, "index": index})

    def end(self) -> int:
        """Kill the process if it still runs; returns its exit code."""
        self.channel.close()
        self.process.kill()
        return self.process.wait()
