"""The command `mexit models`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mexit.commands import output
from mexit.commands.options import Json
from mexit.core.budget import short_macs

if TYPE_CHECKING:
    from mexit.flows.models import NetworkCosts


def models(*, json: Json = False) -> None:
    """List the networks with their input, classes, and cost per exit."""
    from mexit.flows.models import FORMS, network_costs

    networks = network_costs()
    output.print_json([network.to_json() for network in networks]) if json else show_models(networks, FORMS)


def show_models(networks: Sequence[NetworkCosts], own: Mapping[str, str]) -> None:
    """Print one line per exit of every network, and how to name a network of the user."""
    rows = []
    for network in networks:
        shape = " x ".join(str(side) for side in network.input_shape)
        # Two lines of the first column: side by side they are wider than 80 columns.
        names = [network.name, f"{shape}, {network.classes} classes"]
        for number, costs in enumerate(network.exits):
            share = output.percent(costs.macs / network.exits[-1].macs)
            name = names[number] if number < len(names) else ""
            rows.append([name, str(costs.exit), short_macs(costs.macs), share, f"{costs.parameters:,}"])
    columns = ["network", "exit", "MACs", "of full", "parameters"]
    caption = (
        "MACs of an image that leaves at the exit, earlier heads included\n"
        "-single: the same backbone with only its last exit, as a baseline"
    )
    output.table("networks for mexit train --model", columns, rows, caption)
    output.say("your own network, with exits attached to it (docs/training.md):")
    for form, meaning in own.items():
        output.say(f"  {form}: {meaning}")
    output.next_commands("mexit train --model NAME --data NAME")
