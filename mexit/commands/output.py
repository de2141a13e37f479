"""Terminal output: tables, progress bars and JSON. Results go to standard output, the rest to standard error."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from mexit.core.printable import json_text, printable, printable_lines

# Names of files may hold `:cat:` and `[red]`: neither emoji codes nor markup is replaced in them.
out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)


class RichProgress:
    """Notes and progress bars on standard error; without a terminal, notes only."""

    def note(self, text: str) -> None:
        """Print one line."""
        err.print(_plain(text), style="dim", soft_wrap=True)

    @contextmanager
    def track(self, text: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Show a progress bar with its rate, the remaining time and a detail."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
        )
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            task = bar.add_task(text, total=total, detail="", rate="")

            def advance(count: int, detail: str) -> None:
                speed = bar.tasks[0].speed
                bar.update(task, advance=count, detail=detail, rate=f"{speed:.0f}/s" if speed else "")

            yield advance


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print the one JSON value of `--json`."""
    out.file.write(json_text(value, allow_nan=True) + "\n")


def say(text: str) -> None:
    """Print one line of a result."""
    out.print(_plain(text), soft_wrap=True)


def paragraph(text: str) -> None:
    """Print a sentence of a result, wrapped at words; file names and numbers stay whole."""
    width = out.width if out.is_terminal else 80
    out.print(
        _plain(textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)),
        soft_wrap=True,
    )


def error(text: str) -> None:
    """Print an error message on standard error."""
    err.print(f"[bold red]error:[/] {escape(printable(text))}", soft_wrap=True)


def next_commands(*lines: str) -> None:
    """Print commands that usually follow, unwrapped so that they can be copied."""
    out.print("next:", style="bold")
    for line in lines:
        out.print(f"  {escape(printable(line))}", soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """Print a table: the first column is aligned left, the others right. Columns without names have no header."""
    grid = Table(
        title=title,
        title_justify="left",
        caption=caption or None,
        caption_justify="left",
        show_header=any(columns),
    )
    for number, column in enumerate(columns):
        grid.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        grid.add_row(*map(_plain, row))
    out.print(grid)


def _plain(text: str) -> str:
    """A text for rich, without markup and with unprintable characters shown."""
    return escape(printable_lines(text))


def percent(value: float | None) -> str:
    """Format a share in [0, 1]: `97.3%`, or `-` for None."""
    return "-" if value is None else f"{100 * value:.1f}%"


def with_error(entry: Mapping[str, Any]) -> str:
    """Format an accuracy and its standard error: `97.3 ± 0.4%`."""
    return f"{100 * entry['value']:.1f} ± {100 * entry['stderr']:.1f}%"


def counts(values: Sequence[int]) -> str:
    """Format one count per exit: `134 / 71 / 38`."""
    return " / ".join(str(value) for value in values)
