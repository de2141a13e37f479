"""The command `mexit bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mexit.commands import output
from mexit.commands.options import Backend, BundleArg, DataDir, Json, Threads

if TYPE_CHECKING:
    from mexit.flows.bench import BenchResult
    from mexit.runtime.autotune import Explanation


def bench(
    bundle: BundleArg = None,
    *,
    backend: Backend = "auto",
    threads: Threads = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch size; repeatable. Default: 1, 8, 64.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed calls of each path.")] = 200,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="First measure every engine here; --backend auto then uses the fastest."),
    ] = False,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Measure the latency of a bundle on this machine, per path and batch size."""
    from mexit.flows.bench import BATCHES, bench_bundle

    result = bench_bundle(
        bundle,
        backend=backend,
        threads=threads,
        batches=batch or BATCHES,
        repeats=repeats,
        tune=tune,
        data_dir=data_dir,
        progress=output.RichProgress(),
    )
    output.print_json(result.to_json()) if json else show_bench(result)


def show_bench(result: BenchResult) -> None:
    """Print the comparison of the engines, if there is one, and the latency of each path."""
    if result.tuning:
        show_tuning(result.tuning)
    rows = [
        [
            row.path,
            str(row.batch),
            f"{row.p50_us:.0f}",
            f"{row.p95_us:.0f}",
            f"{row.mean_us / row.batch:.1f}",
            str(row.n),
        ]
        for row in result.rows
    ]
    first = result.rows[0]
    caption = f"{first.engine}, {first.threads} thread(s), {result.machine['cpu']}; {result.images}"
    output.table("microseconds per call", ["path", "batch", "p50", "p95", "mean per image", "n"], rows, caption)
    if slower := result.slower_than_full():
        paths = ", ".join(f"{path} (batch {batch})" for path, batch in slower)
        output.say(f"slower here than full, which runs no early heads: {paths}; choose a lower budget, or full")


def show_tuning(explanation: Explanation) -> None:
    """Print the engine that `--backend auto` takes, the measured engines, and how to make more of them usable."""
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
            f"{row.timing.total_us:.0f}",
            row.state,
        ]
        for row in explanation.rows
    ]
    output.table("engines: microseconds per image", ["engine", "threads", "segments", "all", "state"], rows, chosen)
    for name, reason in explanation.skipped.items():
        output.say(f"not measured: {name}: {reason}")
    for command in dict.fromkeys(row.command for row in explanation.rows if row.command):
        output.say(f"faster once calibrated: {command}")
