"""`lw`: adversarial training with a penalty on the exit classifiers (Chen et al., 2022), a baseline of NEO-KD.

    loss = sum_k [ clean_weight CE(f_k(x), y) + attacked_weight CE(f_k(x_adv), y) + weight ||W_k||_F^2 ]

W_k are the weights of the last linear layer of exit k. Published: a penalty on the weights of the exit classifiers,
which otherwise grow larger at late exits than at early ones. Our readings: the squared Frobenius norm, the same factor
for all exits, no penalty on biases, and the size of `weight`. The log shows the norms.
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
    """Adversarial training with a penalty on the classifiers.

    Attributes:
        weight: weight of the penalty.
        clean_weight, attacked_weight: weights of the two cross-entropies.
    """

    weight: float = 0.005
    clean_weight: float = 1.0
    attacked_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise UsageError(f"weight must be at least 0, found {self.weight}")

    def setup(self, run: Setup) -> None:
        super().setup(run)
        if run.model is None:
            raise MexitError("method lw needs the trained network in its setup")
        self.classifiers = classifiers(run.model)

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """The adversarial baseline and the penalty."""
        terms = Adversarial(self.clean_weight, self.attacked_weight).terms(outputs)
        terms["classifiers"] = self.weight * self._squared_norms().sum()
        return terms

    def report(self) -> dict[str, list[float]]:
        """The Frobenius norm of every classifier."""
        return {"classifier norm": [round(float(norm), 6) for norm in self._squared_norms().detach().sqrt()]}

    def _squared_norms(self) -> Tensor:
        return torch.stack([layer.weight.square().sum() for layer in self.classifiers])


def classifiers(model: MultiExit) -> list[nn.Linear]:
    """The last linear layer of every exit, in order. Raises `UsageError` for an exit without one."""
    layers = []
    for k, stage in enumerate(model.stages, start=1):
        linear = [layer for layer in stage.head.modules() if isinstance(layer, nn.Linear)]  # type: ignore[union-attr]
        if not linear:
            raise UsageError(f"method lw needs a linear classifier at every exit, and exit {k} has none")
        layers.append(linear[-1])
    return layers
