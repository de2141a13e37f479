"""`mexit models`: MACs and parameters of every network at every exit, counted on shapes without weights or ONNX."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mexit.errors import requires_extra

with requires_extra("train", "Counting the cost of a network"):
    import torch

    from mexit.models import MODELS
    from mexit.models.backbones import FORMS
    from mexit.models.exit_costs import exit_costs


__all__ = ["FORMS", "ExitRow", "NetworkCosts", "network_costs"]


@dataclass(frozen=True)
class ExitRow:
    """One exit of a network.

    Attributes:
        exit: number of the exit, from 1.
        macs: multiply-adds of an image that leaves at this exit, earlier heads included.
        parameters: parameters of the layers that such an image passes.
    """

    exit: int
    macs: int
    parameters: int


@dataclass(frozen=True)
class NetworkCosts:
    """The exits of a network.

    Attributes:
        name: name of the network for `mexit train --model`.
        input_shape: channels, height, width.
        classes: number of classes in the publication.
        exits: one row per exit.
    """

    name: str
    input_shape: tuple[int, int, int]
    classes: int
    exits: tuple[ExitRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the entry of `mexit models --json`."""
        return asdict(self)


def network_costs() -> list[NetworkCosts]:
    """Count the costs of every network of `mexit.models.MODELS`."""
    networks = []
    for name, spec in MODELS.items():
        with torch.device("meta"):  # tensors with a shape and no values
            costs = exit_costs(spec.build(spec.classes))
        exits = tuple(ExitRow(k, cost.macs, cost.parameters) for k, cost in enumerate(costs, start=1))
        networks.append(NetworkCosts(name, spec.input_shape, spec.classes, exits))
    return networks
