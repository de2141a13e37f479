"""What every method is: a thin objective on the same loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mexit.train.randomness import Draw


@dataclass(frozen=True)
class Outputs:
    """What the loop computed for one batch.

    Attributes:
        labels: (B,) int64.
        index: places in the data set, (B,) int64.
        clean: logits on the images, (E, B, C) float32.
        attacked: logits on the attacked images, (E, B, C) float32; None where the method trains on clean ones.
        draw: randomness of the epoch.
    """

    labels: Tensor
    index: Tensor
    clean: Tensor
    attacked: Tensor | None
    draw: Draw


class Objective(Protocol):
    """A training objective.

    Attributes:
        needs_attack: whether `Outputs.attacked` must be there.
    """

    needs_attack: bool

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Named scalars whose sum is minimised."""
