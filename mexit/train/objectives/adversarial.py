"""`adversarial`: cross-entropy of every exit on clean and on attacked images (RDI-Nets, ICLR 2020).

RDI-Nets' code weights both by 0.5; NEO-KD's baseline "Adv. w/o Distill" sums them with weight 1, the default here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mexit.errors import UsageError
from mexit.train.attacks.objective import exit_losses
from mexit.train.objectives.base import Outputs


@dataclass(frozen=True)
class Adversarial:
    """Minimises sum_k [ clean_weight CE(f_k(x), y) + attacked_weight CE(f_k(x_adv), y) ]."""

    clean_weight: float = 1.0
    attacked_weight: float = 1.0
    needs_attack = True

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """See `base.Objective`."""
        if outputs.attacked is None:
            raise UsageError("this method trains on attacked images: choose --attack average or max-average")
        return {
            "clean": self.clean_weight * exit_losses(outputs.clean, outputs.labels).mean(dim=1).sum(),
            "attacked": self.attacked_weight * exit_losses(outputs.attacked, outputs.labels).mean(dim=1).sum(),
        }
