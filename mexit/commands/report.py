"""The table of `mexit train`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mexit.commands import output

if TYPE_CHECKING:
    from mexit.flows.train import TrainResult


def show_training(result: TrainResult) -> None:
    """The last epoch, and the next command."""
    last = result.records[-1]
    rows = [
        [str(k), *(output.percent(values[k - 1]) for values in last["selection"].values())]
        for k in range(1, len(last["selection"]["clean"]) + 1)
    ]
    columns = ["exit", *(f"{name}, selection split" for name in last["selection"])]
    output.table(f"{result.run}: {last['epoch']} epochs, {result.seconds:.0f} s", columns, rows)
    output.say(f"wrote {result.run}" + (f", {result.picture}" if result.picture else ""))
    output.next_commands("mexit export", f"mexit evaluate {result.run}")
