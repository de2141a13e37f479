"""Standard output and standard error: a closed pipe or a full disk becomes one line, never a traceback."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, NoReturn

from rich.console import Console

from mexit.errors import MexitError


class StandardOutput(Console):
    """Results. A write that fails raises `MexitError`; later ones are discarded."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does."""
        try:
            super().print(*objects, **options)
        except OSError as error:
            self._give_up(str(error.strerror))

    def write_line(self, text: str) -> None:
        """Write a line as it is, without wrapping and styles."""
        try:
            self.file.write(text + "\n")
            self.file.flush()
        except BrokenPipeError:
            self.on_broken_pipe()
        except OSError as error:
            self._give_up(str(error.strerror))

    def on_broken_pipe(self) -> None:
        """Called by rich, whose own method would exit without a word."""
        self._give_up("the program that reads it has ended")

    def _give_up(self, reason: str) -> NoReturn:
        _discard(self)
        raise MexitError(f"standard output cannot be written: {reason}") from None


class StandardError(Console):
    """Messages. A write that fails is no reason to stop the work; later ones are discarded."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does."""
        try:
            super().print(*objects, **options)
        except OSError:
            _discard(self)

    def on_broken_pipe(self) -> None:
        """Called by rich, whose own method would exit."""
        _discard(self)


def _discard(console: Console) -> None:
    """Discard what a console prints from now on, and what its stream still holds and would write at the end."""
    console.quiet = True
    with suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), console.file.fileno())
