"""Delivers items in a thread of its own, so that a slow receiver delays no camera; losses are counted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from mexit.camera.outputs.bounded_queue import BoundedQueue

T = TypeVar("T")
QUEUE_SIZE = 1000  # messages
CLOSE_S = 0.5  # for the delivery of what still waits when a program ends
_JOIN_S = 0.1
_LOG = logging.getLogger("mexit.camera")


class BackgroundSender(Generic[T]):
    """A thread that takes items from a bounded queue and delivers them one by one.

    Attributes:
        stopping: set when delivery has to end at once; `deliver` waits for nothing longer than for it.
        delivered: items that were delivered.
    """

    def __init__(self, name: str, deliver: Callable[[T], bool], size: int = QUEUE_SIZE) -> None:
        """Start the thread.

        Args:
            name: of the thread.
            deliver: delivers an item; returns whether that succeeded. An item that was not delivered is lost.
            size: most items that wait.
        """
        self.stopping = threading.Event()
        self.delivered = 0
        self._queue: BoundedQueue[T] = BoundedQueue(size)
        self._deliver = deliver
        self._failed = 0
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """Items that were not delivered and never will be."""
        return self._queue.lost + self._failed + self._abandoned

    def put(self, item: T, key: str | None = None) -> None:
        """Add an item without waiting; see `BoundedQueue.put`."""
        self._queue.put(item, key)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Deliver what waits for at most `timeout_s` seconds, then give up the rest, which counts as lost."""
        self._queue.close()
        self._thread.join(timeout_s)
        self._queue.clear()
        self.stopping.set()
        self._thread.join(_JOIN_S)
        self._abandoned = self._thread.is_alive()  # blocked in the network; as a daemon it ends with the process

    def _run(self) -> None:
        while (item := self._queue.take()) is not None:
            try:
                delivered = self._deliver(item)
            except Exception:  # the thread has to live on for the next item
                _LOG.exception("%s: an item was not delivered", self._thread.name)
                delivered = False
            if self._abandoned:
                return
            self.delivered += delivered
            self._failed += not delivered
