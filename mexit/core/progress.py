"""How a flow tells what it is doing, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """A listener."""

    def note(self, text: str) -> None:
        """One line worth reading."""

    def track(self, text: str, total: int) -> AbstractContextManager[Callable[[int, str], None]]:
        """Long work: yields `advance(count, detail)`; `total` is in the unit of `count`."""


class Silent:
    """Nobody listens."""

    def note(self, text: str) -> None:
        """See `Progress.note`."""

    @contextmanager
    def track(self, text: str, total: int) -> Iterator[Callable[[int, str], None]]:  # noqa: ARG002
        """See `Progress.track`."""
        yield lambda count, detail: None  # noqa: ARG005
