"""`mexit models`: what every network costs at every exit, counted on shapes alone: no weights, no ONNX."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mexit.errors import missing_extra


@dataclass(frozen=True)
class ExitRow:
    """One exit of one network.

    Attributes:
        exit: from 1.
        macs: of a sample that leaves here, earlier heads included.
        parameters: of everything that ran, likewise.
    """

    exit: int
    macs: int
    parameters: int


@dataclass(frozen=True)
class NetworkCosts:
    """One network, for the number of classes that it was published for; input_shape is (channels, H, W)."""

    name: str
    input_shape: tuple[int, int, int]
    classes: int
    exits: tuple[ExitRow, ...]

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


def models() -> list[NetworkCosts]:
    """Every network. Raises `MissingExtra` without torch."""
    try:
        import torch

        from mexit.models import MODELS
        from mexit.models.exit_costs import exit_costs
    except ImportError as error:
        raise missing_extra(error.name or "torch", "train", "Counting the cost of a network") from None
    rows = []
    for name, spec in MODELS.items():
        with torch.device("meta"):  # shapes without numbers
            costs = exit_costs(spec.build(spec.classes))
        exits = tuple(ExitRow(k, cost.macs, cost.parameters) for k, cost in enumerate(costs, start=1))
        rows.append(NetworkCosts(name, spec.input_shape, spec.classes, exits))
    return rows
