"""A reader thread with a one-slot buffer that keeps the newest frame.

The thread reads as fast as frames arrive, and a frame that was not taken is replaced by the next one. The consumer
thus gets the newest frame, and its age is bounded by one frame interval plus the time of one answer. If every frame
is wanted, the thread waits until the slot is empty instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from typing import Generic, TypeVar

from mexit.camera.frame import Counters, Frame

T = TypeVar("T")
POLL_S = 0.1  # interval at which a waiting consumer checks for a stop signal
JOIN_S = 1.5  # a reader blocked in a dead connection ends later, by its own time-out


class Closed(Exception):
    """No further item will come."""


class LatestFrame(Generic[T]):
    """A one-slot buffer between two threads.

    Attributes:
        replaced: number of items replaced before they were taken.
    """

    def __init__(self) -> None:
        self.replaced = 0
        self._slot: list[T] = []
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None

    def put(self, item: T, *, wait: bool = False) -> None:
        """Put an item in the slot, replacing one that is there; with `wait`, first wait until it is taken."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: not self._slot or self._closed)
            self.replaced += len(self._slot)
            self._slot = [item]
            self._changed.notify_all()

    def close(self, error: BaseException | None = None) -> None:
        """End the buffer; `error` is raised by `take` once the slot is empty."""
        with self._changed:
            self._closed, self._error = True, error
            self._changed.notify_all()

    @property
    def left(self) -> int:
        """Number of items that were put and not taken: replaced, or in the slot."""
        with self._changed:
            return self.replaced + len(self._slot)

    def take(self, timeout_s: float) -> tuple[T, int] | None:
        """Take the item, with the number of items replaced so far; None after `timeout_s` seconds without one.

        Raises:
            Closed: the buffer is closed and empty; or the error that it was closed with.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._slot or self._closed, timeout_s)
            if self._slot:
                self._changed.notify_all()
                return self._slot.pop(), self.replaced
            if self._error is not None:
                raise self._error
            if self._closed:
                raise Closed
            return None


def read_in_thread(
    frames: Generator[Frame, None, None],
    stop: threading.Event,
    counters: Counters,
    should_stop: Callable[[], bool],
    *,
    every_frame: bool,
) -> Generator[Frame, None, None]:
    """Run a reader in a thread and yield its frames.

    Args:
        frames: the reader.
        stop: set when this generator is closed; the reader must end then.
        counters: its `replaced` is updated.
        should_stop: called about ten times a second; True ends the iteration.
        every_frame: yield every frame, not only the newest.
    """
    buffer: LatestFrame[Frame] = LatestFrame()
    before = counters.replaced  # by an earlier reader of the same camera
    thread = threading.Thread(target=_fill, args=(buffer, frames, stop, every_frame), name="mexit-camera", daemon=True)
    thread.start()
    try:
        while not should_stop():
            taken = buffer.take(POLL_S)
            if taken is not None:
                frame, replaced = taken
                counters.replaced = before + replaced
                yield replace(frame, dropped=frame.dropped + counters.replaced)
    except Closed:
        return
    finally:
        stop.set()
        buffer.close()
        thread.join(JOIN_S)
        counters.replaced = before + buffer.left


def _fill(
    buffer: LatestFrame[Frame], frames: Generator[Frame, None, None], stop: threading.Event, every_frame: bool
) -> None:
    try:
        with closing(frames):
            for frame in frames:
                buffer.put(frame, wait=every_frame)
                if stop.is_set():
                    break
    except BaseException as error:  # every error must reach the consumer, which would wait for ever otherwise
        buffer.close(error)
    else:
        buffer.close()
