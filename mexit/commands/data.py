"""`mexit data`: what a data set or a folder of pictures holds, and its problems."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mexit.commands import output
from mexit.commands.options import DataDir, Json
from mexit.core.printable import shell_path

if TYPE_CHECKING:
    from mexit.flows.data import DatasetReport

_MAX_ROWS = 60  # classes in the table


def data(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="A folder of pictures, or a data set such as mnist.", show_default=False),
    ],
    *,
    data_dir: DataDir = None,
    group: Annotated[
        str | None,
        typer.Option(
            help="Pictures of one object, film or burst: auto, folder, none, or a regular expression on the path. "
            "Default: auto for folders, else none.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Check a folder of pictures: classes, counts, sizes, groups, unreadable files and other problems."""
    from mexit.flows.data import report_data

    report = report_data(path, data_dir=data_dir, group=group, progress=output.RichProgress())
    output.print_json(report.to_json()) if json else show_report(report)
    if report.blocked:
        raise typer.Exit(1)


def show_report(report: DatasetReport) -> None:
    """Print the classes, what the pictures are like, and the problems."""
    parts = list(report.counts)
    totals = [sum(counts) for counts in zip(*report.counts.values(), strict=True)]
    rows = [
        [
            name,
            *(f"{report.counts[part][label]:,}" for part in parts),
            *([f"{totals[label]:,}"] if len(parts) > 1 else []),
        ]
        for label, name in enumerate(report.classes)
    ]
    left_out = len(rows) - _MAX_ROWS
    sums = [f"{sum(report.counts[part]):,}" for part in parts]
    rows = [*rows[:_MAX_ROWS], ["all", *sums, *([f"{report.pictures:,}"] if len(parts) > 1 else [])]]
    columns = [
        "class",
        *("pictures" if part == "all" else part for part in parts),
        *(["total"] if len(parts) > 1 else []),
    ]
    caption = f"{left_out:,} more classes: --json lists them" if left_out > 0 else ""
    output.table(f"{report.name}: {len(report.classes)} classes", columns, rows, caption)
    for title, text in _facts(report):
        output.paragraph(f"{title}: {text}")
    for problem in report.problems:
        output.paragraph(f"{'blocks training' if problem.blocks else 'warning'}: {problem.text}")
    if not report.problems:
        output.say("no problems found")
    if not report.blocked:
        output.next_commands(f"mexit train --data {shell_path(report.name)}")


def _facts(report: DatasetReport) -> list[tuple[str, str]]:
    facts = []
    if report.sizes is not None:
        names = (
            ("smallest", report.sizes.smallest),
            ("median", report.sizes.median),
            ("largest", report.sizes.largest),
        )
        facts.append(("sizes", ", ".join(f"{name} {h} x {w}" for name, (h, w) in names) + " (height x width)"))
    facts.append(("modes", ", ".join(f"{count:,} {mode}" for mode, count in report.modes.items())))
    if report.grey_bits is not None:
        facts.append(("grey values of 16-bit files", f"{report.grey_bits} bits are used"))
    facts.append(("groups", report.groups))
    facts.append(("splits", ", ".join(f"{name} {count:,}" for name, count in report.splits.items())))
    return [(title, text) for title, text in facts if text]
