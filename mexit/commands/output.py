"""Everything that is printed. Results go to standard output, progress and errors to standard error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from mexit.core.budget import short_macs
from mexit.core.policies import Outcome, PolicyEntry

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class RichProgress:
    """Notes and progress bars on standard error; plain lines where that is no terminal."""

    def note(self, text: str) -> None:
        """One line."""
        err.print(escape(text), style="dim", soft_wrap=True)

    @contextmanager
    def track(self, text: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """One bar with a rate, the time left and a detail."""
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
    """The one object or array of `--json`."""
    out.file.write(json.dumps(value) + "\n")


def say(text: str) -> None:
    """One line of result."""
    out.print(escape(text), soft_wrap=True)


def error(text: str) -> None:
    """Why a command ended."""
    err.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)


def next_commands(*lines: str) -> None:
    """What to type next."""
    out.print(Panel("\n".join(escape(line) for line in lines), title="next", title_align="left", expand=False))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """A table; the first column to the left, the others to the right."""
    shown = Table(
        title=title,
        title_justify="left",
        caption=caption or None,
        caption_justify="left",
        show_header=any(columns),
    )
    for place, column in enumerate(columns):
        shown.add_column(column, justify="left" if place == 0 else "right")
    for row in rows:
        shown.add_row(*(escape(cell) for cell in row))
    out.print(shown)


def percent(value: float | None) -> str:
    """97.3%, or a dash."""
    return "-" if value is None else f"{100 * value:.1f}%"


def with_error(entry: Mapping[str, Any]) -> str:
    """An accuracy with its standard error."""
    return f"{100 * entry['value']:.1f} ± {100 * entry['stderr']:.1f}%"


def counts(values: Sequence[int]) -> str:
    """Exits taken: 134 / 71 / 38."""
    return " / ".join(str(value) for value in values)


def calibration_table(entry: PolicyEntry) -> None:
    """What each named budget promises."""
    rows = []
    for name, index in sorted(entry.named.items(), key=lambda item: item[1]):
        point = entry.frontier[index]
        held_out, attacked = point.held_out or point.calibration, point.attacked
        rows.append(
            [
                name,
                short_macs(point.budget_macs),
                short_macs(held_out.mean_macs),
                percent(held_out.accuracy),
                counts(held_out.exits),
                short_macs(attacked.mean_macs) if attacked else "-",
                percent(attacked.accuracy) if attacked else "-",
            ]
        )
    columns = ["budget", "MACs", "mean", "accuracy", "exits taken", "attacked: mean", "accuracy"]
    table("promised: mean cost in MACs and accuracy on held-out data", columns, rows, _calibration_caption(entry))


def _calibration_caption(entry: PolicyEntry) -> str:
    held_out = entry.frontier[0].held_out
    parts = [f"thresholds from {entry.trace.n} calibration images"]
    if isinstance(held_out, Outcome):
        parts.append(f"promises from {held_out.n} certification images, which chose nothing")
    attacks = dict.fromkeys(ref.condition for ref in entry.evidence if ref.condition != "clean")
    return "; ".join(parts + [f"attack: {attack}" for attack in attacks])


def parity_table(found: Any) -> None:
    """How a second set of segments answers, an `export.parity.Parity`, held against fp32."""
    rows = [
        [
            str(one.exit),
            f"{one.largest_difference:.2e}",
            percent(one.agreement),
            percent(one.accuracy),
            percent(one.accuracy_fp32),
        ]
        for one in found.exits
    ]
    columns = ["exit", "largest difference", "same answer", f"accuracy {found.precision}", "accuracy fp32"]
    title = f"{found.precision} against fp32 on {found.n} images of the {found.split} split"
    table(title, columns, rows, "what it answers, not how fast: that is what mexit bench --tune measures")
