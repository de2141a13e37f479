"""What a long task and its caller exchange: progress, and the request to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType, TracebackType
from typing import Protocol

SAME_STOP_S = 0.5  # `timeout` signals the program and then its process group: one request comes as two signals


class Advance(Protocol):
    """Receives the progress of one long task."""

    def __call__(self, steps: int, detail: str, remaining_s: float | None = None) -> None:
        """Report `steps` more steps; without `remaining_s`, the remaining time in seconds follows from their rate."""


class Progress(Protocol):
    """Receives notes and progress."""

    def note(self, text: str) -> None:
        """Report one line."""

    def log(self, text: str) -> None:
        """Report one line about a part of a long task, where no progress bar shows it."""

    def track(self, text: str, total: int) -> AbstractContextManager[Advance]:
        """Report a long task of `total` steps."""


class Silent:
    """Discards notes and progress."""

    def note(self, text: str) -> None:
        pass

    def log(self, text: str) -> None:
        pass

    @contextmanager
    def track(self, text: str, total: int) -> Iterator[Advance]:  # noqa: ARG002
        yield lambda steps, detail, remaining_s=None: None  # noqa: ARG005


class StopSignal:
    """Record the first SIGINT or SIGTERM; a second one has its previous effect.

    Signals within `SAME_STOP_S` of the first one belong to the same request and are ignored.

    Outside the main thread, signals keep their handlers and no stop is requested.

    Args:
        on_stop: called in the signal handler when a stop is requested.
        interrupts: whether the first signal raises `KeyboardInterrupt` at once, until `defer` is called.

    Attributes:
        number: number of the signal; None while none came. A plain attribute, because a handler must not wait for
            a lock.
    """

    def __init__(self, on_stop: Callable[[], None] = lambda: None, *, interrupts: bool = False) -> None:
        self.number: int | None = None
        self._first_s = 0.0
        self._on_stop = on_stop
        self._on_second: Callable[[int], None] = self._repeat
        self._interrupts = interrupts
        self._previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as shells report it; 0 while none came."""
        return 0 if self.number is None else 128 + self.number

    def defer(self, on_stop: Callable[[], None] | None = None, on_second: Callable[[int], None] | None = None) -> None:
        """From now on, only record the first signal.

        Args:
            on_stop: called when a stop is requested, in place of the function given before.
            on_second: called with the number of a second signal, in place of its previous effect.

        Raises:
            KeyboardInterrupt: a signal came before, and its `KeyboardInterrupt` was lost. Some extension modules
                discard it while they are loaded.
        """
        self._on_stop, self._on_second = on_stop or self._on_stop, on_second or self._on_second
        interrupts, self._interrupts = self._interrupts, False
        if interrupts and self.requested:
            raise KeyboardInterrupt

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, number: int, _: FrameType | None) -> None:
        now_s = time.monotonic()
        if self.number is None:
            self._first_s, self.number = now_s, number
            if self._interrupts:
                raise KeyboardInterrupt
            self._on_stop()
        elif now_s - self._first_s >= SAME_STOP_S:
            self._on_second(number)

    def _repeat(self, number: int) -> None:
        self._restore()
        signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def end_by_signal(number: int) -> None:
    """End this process by a signal, whatever handler it has."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def duration(seconds: float) -> str:
    """Format a duration: `4:32`, or `1:04:32` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
