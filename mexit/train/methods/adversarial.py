"""`adversarial`: cross-entropy of every exit on clean and on attacked images (RDI-Nets, ICLR 2020).

RDI-Nets' code weights both by 0.5; NEO-KD's baseline "Adv. w/o Distill" sums them with weight 1, the default here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mexit.train.methods.base import Outputs, TrainingMethod


@dataclass(frozen=True)
class Adversarial(TrainingMethod):
    """Minimises sum_k [ clean_weight CE(f_k(x), y) + attacked_weight CE(f_k(x_adv), y) ].

    Attributes:
        clean_weight, attacked_weight: of the two cross-entropies.
    """

    clean_weight: float = 1.0
    attacked_weight: float = 1.0

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """See `base.TrainingMethod`."""
        attacked = outputs.need_attacked()
        return {
            "clean": self.clean_weight * outputs.cross_entropy(outputs.clean).sum(),
            "attacked": self.attacked_weight * outputs.cross_entropy(attacked).sum(),
        }
