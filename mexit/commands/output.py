"""Terminal output: tables, progress bars and JSON. Results go to standard output, the rest to standard error."""

from __future__ import annotations

import json
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

from mexit.core.redact import redact_text

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class RichProgress:
    """Notes and progress bars on standard error; without a terminal, notes only."""

    def note(self, text: str) -> None:
        """Print one line."""
        err.print(escape(redact_text(text)), style="dim", soft_wrap=True)

    @contextmanager
    def track(self, text: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Show a progress bar with its rate, the remaining time and a detail."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
        )
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            task = bar.add_task(text, total=total, detail="", rate="")

            def advance(count: int, detail: str) -> None:
                speed = bar.tasks[0].speed
                bar.update(task, advance=count, detail=detail, rate=f"{speed:.0f}/s" if speed else "")

            yield advance


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print the one JSON value of `--json`."""
    out.file.write(json.dumps(value) + "\n")


def say(text: str) -> None:
    """Print one line of a result."""
    out.print(escape(text), soft_wrap=True)


def error(text: str) -> None:
    """Print an error message on standard error, without the passwords of addresses in it."""
    err.print(f"[bold red]error:[/] {escape(redact_text(text))}", soft_wrap=True)


def next_commands(*lines: str) -> None:
    """Print commands that usually follow, unwrapped so that they can be copied."""
    out.print("next:", style="bold")
    for line in lines:
        out.print(f"  {escape(line)}", soft_wrap=True)


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
        grid.add_row(*(escape(cell) for cell in row))
    out.print(grid)


def percent(value: float | None) -> str:
    """Format a share in [0, 1]: `97.3%`, or `-` for None."""
    return "-" if value is None else f"{100 * value:.1f}%"


def with_error(entry: Mapping[str, Any]) -> str:
    """Format an accuracy and its standard error: `97.3 ± 0.4%`."""
    return f"{100 * entry['value']:.1f} ± {100 * entry['stderr']:.1f}%"


def counts(values: Sequence[int]) -> str:
    """Format one count per exit: `134 / 71 / 38`."""
    return " / ".join(str(value) for value in values)
