"""The interface through which flows report their progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Receives notes and progress."""

    def note(self, text: str) -> None:
        """Report one line."""

    def track(self, text: str, total: int) -> AbstractContextManager[Callable[[int, str], None]]:
        """Report a long task of `total` steps; yields `advance(steps, detail)`."""


class Silent:
    """Discards notes and progress."""

    def note(self, text: str) -> None:
        """Discard the line."""

    @contextmanager
    def track(self, text: str, total: int) -> Iterator[Callable[[int, str], None]]:  # noqa: ARG002
        """Yield an `advance` that does nothing."""
        yield lambda steps, detail: None  # noqa: ARG005
