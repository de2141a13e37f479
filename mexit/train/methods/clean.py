"""`clean`: cross-entropy of every exit on clean images, summed over exits (MSDNet, ICLR 2018)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mexit.train.methods.base import Outputs, TrainingMethod


@dataclass
class Clean(TrainingMethod):
    """Training on clean images: sum_k CE(f_k(x), y)."""

    inputs = "clean"
    default_attack = "none"
    attack_use = "never"

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        return {"clean": outputs.cross_entropy(outputs.clean).sum()}
