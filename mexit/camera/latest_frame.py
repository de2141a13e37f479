"""A reader thread, and a mailbox with one slot between it and whoever answers.

The newest-frame rule: the thread reads as fast as frames come, and a frame that nobody took is replaced by the
next one. So whoever takes a frame gets the newest, and its age is bounded by one frame interval plus one answer,
however slow the answers. Where every frame is wanted, the thread waits until the slot is empty instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from typing import Generic, TypeVar

from mexit.camera.frame import Counters, Frame

T = TypeVar("T")
TICK_S = 0.1  # how often a waiting consumer looks for a stop signal
CLOSE_WAIT_S = 2.0  # a reader that is stuck in a dead connection ends by its own time-out, unattended


class Closed(Exception):
    """Nothing will come any more."""


class LatestFrame(Generic[T]):
    """One slot between two threads.

    Attributes:
        replaced: how many items nobody took.
    """

    def __init__(self) -> None:
        self.replaced = 0
        self._slot: list[T] = []
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None

    def put(self, item: T, *, wait: bool = False) -> None:
        """Put an item in, in place of one that is still there, or once that was taken if `wait`."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: not self._slot or self._closed)
            self.replaced += len(self._slot)
            self._slot = [item]
            self._changed.notify_all()

    def close(self, error: BaseException | None = None) -> None:
        """Nothing comes after this; `error` is why."""
        with self._changed:
            self._closed, self._error = True, error
            self._changed.notify_all()

    def take(self, timeout_s: float) -> tuple[T, int] | None:
        """The item and how many were replaced before it, or None if none came in time.

        Raises:
            Closed: the mailbox is empty for good; or the error it was closed with.
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


def threaded(
    shots: Generator[Frame, None, None],
    stop: threading.Event,
    counters: Counters,
    tick: Callable[[], bool],
    *,
    wait: bool,
) -> Generator[Frame, None, None]:
    """The shots of a reader that runs in a thread of its own.

    Args:
        shots: the reader.
        stop: set when this generator is closed; the reader must obey it.
        counters: told how many shots were replaced.
        tick: called about ten times a second while waiting; true ends it.
        wait: give every shot, rather than the newest whenever one is asked for.
    """
    latest_frame: LatestFrame[Frame] = LatestFrame()
    fill = (latest_frame, shots, stop, wait)
    thread = threading.Thread(target=_fill, args=fill, name="mexit-camera", daemon=True)
    thread.start()
    try:
        while not tick():
            taken = latest_frame.take(TICK_S)
            if taken is not None:
                shot, counters.replaced = taken
                yield replace(shot, dropped=shot.dropped + counters.replaced)
    except Closed:
        return
    finally:
        stop.set()
        latest_frame.close()
        thread.join(CLOSE_WAIT_S)
        counters.replaced = latest_frame.replaced


def _fill(
    latest_frame: LatestFrame[Frame], shots: Generator[Frame, None, None], stop: threading.Event, wait: bool
) -> None:
    try:
        with closing(shots):
            for shot in shots:
                latest_frame.put(shot, wait=wait)
                if stop.is_set():
                    break
    except BaseException as error:  # whatever it is, the consumer must hear of it rather than wait for ever
        latest_frame.close(error)
    else:
        latest_frame.close()
