"""`clean`: cross-entropy of every exit on the images as they are, summed over exits (MSDNet, ICLR 2018)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mexit.train.methods.base import Outputs, TrainingMethod


@dataclass(frozen=True)
class Clean(TrainingMethod):
    """Minimises sum_k CE(f_k(x), y)."""

    inputs = "clean"
    default_attack = "none"
    attack_use = "never"

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """See `base.TrainingMethod`."""
        return {"clean": outputs.cross_entropy(outputs.clean).sum()}
