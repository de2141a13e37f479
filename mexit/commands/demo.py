"""The command `mexit demo`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mexit.commands import output
from mexit.commands.options import Json
from mexit.core.budget import short_macs
from mexit.core.printable import shell_path

if TYPE_CHECKING:
    from mexit.flows.demo import DemoResult


def demo(
    threads: Annotated[
        int | None, typer.Option(help="Threads for training. [dim]Default: all cores.[/]", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Run the whole pipeline on the embedded digits data set, in under two minutes on two cores."""
    from mexit.flows.demo import run_demo

    result = run_demo(threads=threads, progress=output.RichProgress())
    output.print_json(result.report) if json else show_demo(result)


def show_demo(result: DemoResult) -> None:
    """Print accuracy, cost and time per budget."""
    report = result.report
    rows = [
        [
            ", ".join(names),
            output.percent(row["accuracy"]),
            output.percent(row["attacked"]),
            short_macs(row["budget_macs"]),
            short_macs(row["mean_macs"]),
            output.percent(row["saved"]),
            output.counts(row["exits"]),
            f"{result.latency_us[names[0]]:.0f}",
        ]
        for names in report["same_policy"]
        for row in [report["budgets"][names[0]]]
    ]
    columns = ["budget", "clean", "attacked", "MACs", "mean", "saved", "exits taken", "us"]
    exits = ", ".join(f"exit {row['exit']} {output.percent(row['clean'])}" for row in report["exits"])
    caption = (
        f"accuracy on {report['n']} test images; attack: {report['attack']}\n"
        "MACs: the budget, in multiply-adds; mean: MACs spent per image; us: median time of one image\n"
        f"clean accuracy of each exit alone: {exits}\n"
        f"total time: {report['seconds']:.0f} s"
    )
    output.table("digits with NEO-KD, three exits", columns, rows, caption)
    written = [report["run"], report["bundle"], result.picture, result.samples[0].parent]
    output.say("wrote " + ", ".join(str(path) for path in written if path))
    output.next_commands(
        f"mexit run {shell_path(result.samples[0])} {shell_path(result.samples[1])} --budget low",
        "mexit serve --budget low",
        f"curl --data-binary @{shell_path(result.samples[0])} http://127.0.0.1:8000/v1/classify",
        f"mexit camera --source {shell_path(result.samples[0].parent / '*.png')} --out annotated.mp4",
        "mexit inspect",
        "mexit train --help",
    )
