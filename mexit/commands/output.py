"""Terminal output: tables, progress bars and JSON. Results go to standard output, the rest to standard error."""

from __future__ import annotations

import errno
import os
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
)
from rich.table import Column, Table

from mexit.commands.fit_columns import GAP, fit
from mexit.core.printable import json_text, printable, printable_lines
from mexit.core.progress import Advance, duration
from mexit.core.redact import redact_text


class _Console(Console):
    """A console that raises `BrokenPipeError` for a closed pipe, where rich ends the program."""

    def on_broken_pipe(self) -> None:
        """Raise the error."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


MACS = "MACs: multiply-adds of an image"  # for captions
# Names of files may hold `:cat:` and `[red]`: neither emoji codes nor markup is replaced in them.
out = _Console(highlight=False, emoji=False)
err = _Console(stderr=True, highlight=False, emoji=False)


class RichProgress:
    """Notes and progress bars on standard error; without a terminal, notes and one line for each part of a task."""

    def note(self, text: str) -> None:
        """Print one line; a terminal gets it wrapped at words."""
        shown = redact_text(text)
        _say_on_stderr(printable_lines(_filled(shown, err.width) if err.is_terminal else shown), style="dim")

    def log(self, text: str) -> None:
        """Print one line unless a progress bar shows the same."""
        if not err.is_terminal:
            _say_on_stderr(printable_lines(redact_text(text)))

    @contextmanager
    def track(self, text: str, total: int) -> Iterator[Advance]:
        """Show a progress bar with the share done, a detail and the remaining time, in one line of the terminal."""
        one_line = Column(no_wrap=True)
        columns = (
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=None, table_column=Column(min_width=6, ratio=1)),
            TaskProgressColumn(table_column=one_line),
            TextColumn("{task.fields[detail]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            TextColumn("{task.fields[left]}", table_column=one_line),
        )
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal, expand=True) as bar:
            task = bar.add_task(text, total=total, detail="", left="")

            def advance(steps: int, detail: str, remaining_s: float | None = None) -> None:
                known = bar.tasks[0].time_remaining if remaining_s is None else remaining_s
                left = "" if known is None else f"{duration(known)} left"
                bar.update(task, advance=steps, detail=detail, left=left)

            yield advance


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print the one JSON value of `--json`."""
    out.file.write(json_text(value, allow_nan=True) + "\n")


def say(text: str) -> None:
    """Print one line of a result."""
    out.print(_plain(text), soft_wrap=True)


def paragraph(text: str) -> None:
    """Print a sentence of a result, wrapped at words; file names and numbers stay whole."""
    _wrapped(text, indent="  ")


def _wrapped(text: str, style: str | None = None, indent: str = "") -> None:
    """Print lines wrapped at words to the width of the terminal, or to 80 columns without one."""
    width = out.width if out.is_terminal else 80
    out.print(_plain(_filled(text, width, indent)), style=style, soft_wrap=True)


def _filled(text: str, width: int, indent: str = "") -> str:
    """The lines of a text, wrapped at words."""
    how: dict[str, Any] = {"subsequent_indent": indent, "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(line, width, **how) for line in text.split("\n"))


def error(text: str) -> None:
    """Print an error message on standard error, without the passwords of addresses in it."""
    _say_on_stderr(printable(redact_text(text)), "[bold red]error:[/] ")


def warning(text: str) -> None:
    """Print a warning on standard error."""
    _say_on_stderr(printable(redact_text(text)), "[yellow]warning:[/] ")


def _say_on_stderr(text: str, markup: str = "", style: str | None = None) -> None:
    """Print one line on standard error. A full disk or a closed pipe there hides only the line."""
    with suppress(OSError):
        err.print(markup + escape(text), style=style, soft_wrap=True)


def system_error(cause: OSError) -> int:
    """Print one line about an error of the system, such as a full disk, and return the exit code.

    A closed standard output (`mexit ... | head`) is no error.
    """
    _discard_output()
    if isinstance(cause, BrokenPipeError):
        return 0
    writing = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    what = cause.filename or ("could not write the output" if writing else "the system failed")
    error(f"{os.fsdecode(what)}: {cause.strerror or cause}")
    return 1


def _discard_output() -> None:
    """Drop what a standard output that cannot be written still holds: Python would fail on it again at its end."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        with suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)


def next_commands(*lines: str) -> None:
    """Print commands that usually follow, unwrapped so that they can be copied."""
    out.print("next:", style="bold")
    for line in lines:
        out.print(f"  {escape(printable(line))}", soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """Print a table: the first column is aligned left, the others right. Columns without names have no header.

    Title and caption may be wider than the table; both are wrapped at words.
    """
    grid = Table(show_header=any(columns), show_edge=False, pad_edge=False)
    for number, column in enumerate(columns):
        grid.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        grid.add_row(*map(_plain, row))
    if title:
        _wrapped(title, "table.title")
    out.print(grid)
    if caption:
        _wrapped(caption, "table.caption")


def aligned(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, drop: Sequence[str] = (), shorten: Sequence[str] = ()
) -> tuple[str, ...]:
    """Print one unwrapped line per row under a header, in columns without borders; the last one is not padded.

    Without a terminal the lines are as long as their cells.

    Args:
        columns: the headers.
        rows: the cells.
        drop: headers of the columns that may be dropped on a narrow terminal, the first one first.
        shorten: headers of the columns whose cells may be shortened there.

    Returns:
        The headers of the columns that were dropped.
    """
    lines: list[list[str]] = [list(columns), *([printable(cell) for cell in row] for row in rows)]
    dropped: tuple[str, ...] = ()
    if out.is_terminal:
        lines, dropped = fit(lines, out.width, drop=drop, shorten=shorten)
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)][:-1]
    for number, (*cells, last) in enumerate(lines):
        padded = [cell + " " * (width - cell_len(cell)) for cell, width in zip(cells, widths, strict=True)]
        out.print(escape((" " * GAP).join([*padded, last])), style=None if number else "bold", soft_wrap=True)
    return dropped


def _plain(text: str) -> str:
    """A text for rich, without markup and with unprintable characters shown."""
    return escape(printable_lines(text))


def percent(value: float | None) -> str:
    """Format a share in [0, 1]: `97.3%`, or `-` for None."""
    return "-" if value is None else f"{round(100 * value, 1) + 0.0:.1f}%"  # + 0.0: no "-0.0%"


def with_error(entry: Mapping[str, Any]) -> str:
    """Format an accuracy and its standard error: `97.3 ± 0.4%`."""
    return f"{100 * entry['value']:.1f} ± {100 * entry['stderr']:.1f}%"


def counts(values: Sequence[int]) -> str:
    """Format one count per exit: `134 / 71 / 38`."""
    return " / ".join(str(value) for value in values)
