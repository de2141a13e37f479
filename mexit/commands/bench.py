"""The command `mexit bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mexit.commands import output
from mexit.commands.options import Backend, BundleArg, CostOption, DataDir, Json, ProfileOption, Threads
from mexit.core.budget import short_macs

if TYPE_CHECKING:
    from mexit.flows.bench_result import BenchResult
    from mexit.runtime.autotune import Explanation


def bench(
    bundle: BundleArg = None,
    *,
    backend: Backend = "auto",
    threads: Threads = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch size; repeatable. Default: 1, 8, 64.")] = None,
    repeats: Annotated[
        int, typer.Option(help="Timed calls of each budget with one image; larger batches get fewer.")
    ] = 200,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="First measure every engine here; --backend auto then uses the fastest."),
    ] = False,
    cost: CostOption = "time",
    profile: ProfileOption = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Compare every budget of a bundle with the static network here: time, accuracy, MACs (multiply-adds)."""
    from mexit.flows.bench import BATCHES, bench_bundle

    result = bench_bundle(
        bundle,
        backend=backend,
        threads=threads,
        batches=batch or BATCHES,
        repeats=repeats,
        tune=tune,
        cost=cost,
        profile=profile,
        data_dir=data_dir,
        progress=output.RichProgress(),
    )
    output.print_json(result.to_json()) if json else show_bench(result)


def show_bench(result: BenchResult) -> None:
    """Print the comparison of the engines, if there is one, every path against the static network, and the verdict."""
    from mexit.flows.bench_result import points, share

    if result.tuning:
        show_tuning(result.tuning)
    rows = [
        [
            row.path,
            str(row.batch),
            f"{row.mean_us / row.batch:.1f}",
            f"{row.p95_us:.0f}",
            share(row.of_static),
            points(row.accuracy_change, row.accuracy_error),
            "-" if row.macs is None else short_macs(row.macs),
        ]
        for row in result.rows
    ]
    first = result.rows[0]
    expected = f"; accuracy and MACs expected from {result.expected_on}" if result.expected_on else ""
    unit = {"macs": "MACs", "time": "time"}[result.cost]
    caption = (
        f"{first.engine}, {first.threads} thread(s), {result.machine['cpu']}; budgets in {unit}; "
        f"{result.images}{expected}\n{output.MACS}"
    )
    columns = ["budget", "batch", "us/image", "p95 us", "of static", "points", "MACs"]
    output.table("every budget against the static network (full)", columns, rows, caption)
    if slower := result.slower_than_static():
        paths = ", ".join(f"{row.path} (batch {row.batch}, {share(row.of_static)})" for row in slower)
        output.paragraph(f"slower here than the static network: {paths}")
    output.paragraph(result.verdict())


def show_tuning(explanation: Explanation, *, every_engine: bool = True) -> None:
    """Print the engine that `--backend auto` takes, the measured engines, and how to make more of them usable.

    Args:
        explanation: the choice and the measurements.
        every_engine: whether to print the engines that can neither serve now nor would be faster.
    """
    choice = explanation.choice
    chosen = f"auto on this device: {choice.backend}, {choice.threads} thread(s), {choice.reason}"
    if not explanation.rows:
        output.say(f"{chosen}; mexit bench --tune measures the engines")
        return
    rows = [
        [
            row.timing.backend,
            str(row.timing.threads),
            output.counts([round(us) for us in row.timing.segments_us]),
            f"{row.timing.costs.static:.0f}",
            f"{row.mean_us:.0f}",
            row.state,
        ]
        for row in explanation.rows
        if every_engine or row.usable_or_faster
    ]
    columns = ["engine", "threads", "segments", "full", "mean of\nbudgets", "state"]
    apart = "single calls, to compare engines; times of exits and of budgets are end to end and measured apart"
    output.table("engines: microseconds per image", columns, rows, f"{chosen}\n{apart}")
    for name, reason in explanation.skipped.items() if every_engine else ():
        output.paragraph(f"not measured: {name}: {reason}")
    for command in dict.fromkeys(row.command for row in explanation.rows if row.command):
        output.say(f"faster once calibrated: {command}")
