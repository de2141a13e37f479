"""`lw`: adversarial training with small exit classifiers (Chen et al., 2022), a baseline in NEO-KD's comparison.

    loss = sum_k [ clean_weight CE(f_k(x), y) + attacked_weight CE(f_k(x_adv), y) + weight ||W_k||_F^2 ]

with W_k the weights of the last linear layer of exit k. Certain: the weights of exit classifiers are penalised.
Readings: the squared Frobenius norm, the same factor for all exits, biases left out, and the size of `weight`. The
log shows the norms: the penalty is against late exits whose weights grow above those of early ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mexit.errors import MexitError, UsageError
from mexit.models.multi_exit import MultiExit
from mexit.train.methods.adversarial import Adversarial
from mexit.train.methods.base import Outputs, Setup, TrainingMethod


@dataclass
class LW(TrainingMethod):
    """The adversarial baseline and a penalty on the classifiers.

    Attributes:
        weight: of the penalty.
        clean_weight, attacked_weight: of the two cross-entropies.
    """

    weight: float = 0.005
    clean_weight: float = 1.0
    attacked_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise UsageError(f"weight must be at least 0, found {self.weight}")

    def setup(self, setup: Setup) -> None:
        """See `base.TrainingMethod`."""
        if setup.model is None:
            raise MexitError("lw penalises weights of the network, and was set up without it")
        self.classifiers = classifiers(setup.model)

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """See `base.TrainingMethod`."""
        terms = Adversarial(self.clean_weight, self.attacked_weight).terms(outputs)
        terms["classifiers"] = self.weight * self._squared_norms().sum()
        return terms

    def report(self) -> dict[str, list[float]]:
        """The Frobenius norm of every classifier."""
        return {"classifier norm": [round(float(norm), 6) for norm in self._squared_norms().detach().sqrt()]}

    def _squared_norms(self) -> Tensor:
        return torch.stack([layer.weight.square().sum() for layer in self.classifiers])


def classifiers(model: MultiExit) -> list[nn.Linear]:
    """The last linear layer of every exit, in order."""
    found = []
    for k, stage in enumerate(model.stages, start=1):
        layers = [layer for layer in stage.head.modules() if isinstance(layer, nn.Linear)]  # type: ignore[union-attr]
        if not layers:
            raise UsageError(f"method lw needs a linear classifier at every exit, and exit {k} has none")
        found.append(layers[-1])
    return found
