"""`adversarial`: cross-entropy of every exit on clean and on attacked images (RDI-Nets, ICLR 2020).

    loss = sum_k [ clean_weight CE(f_k(x), y) + attacked_weight CE(f_k(x_adv), y) ]

Difference from the paper: RDI-Nets' code weights both terms by 0.5, which the preset `rdi` sets. The default of 1 is
that of NEO-KD's baseline "Adv. w/o Distill".
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mexit.train.methods.base import Outputs, TrainingMethod


@dataclass
class Adversarial(TrainingMethod):
    """Adversarial training of all exits.

    Attributes:
        clean_weight, attacked_weight: weights of the two cross-entropies.
    """

    clean_weight: float = 1.0
    attacked_weight: float = 1.0

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        attacked = outputs.require_attacked()
        return {
            "clean": self.clean_weight * outputs.cross_entropy(outputs.clean).sum(),
            "attacked": self.attacked_weight * outputs.cross_entropy(attacked).sum(),
        }
