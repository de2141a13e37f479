"""`mse`: training with the Brier score, which makes teachers whose outputs are closer to class probabilities.

S. M. Hamidi, X. Deng, R. Tan, L. Ye, A. H. Salamah: how to train the teacher model for effective knowledge
distillation, ECCV 2024. Summed over exits,

    loss = (1-mu) CE + mu (C/2) || softmax(z) - e_y ||^2        after a share `warm_up` of the run with CE alone

Certain: squared error between probabilities and the one-hot label. Our choice, so that learning begins at all: the
sum over classes times C/2, whose gradient at a uniform output is that of CE (a mean over classes is C times
smaller), and the warm-up. A confidently wrong output has almost no gradient, so attacked images, of which many are
that, keep half of CE by default, and no attack ever climbs this loss. Whether the published runs took the error on
probabilities or on logits is not known: `on=logits` takes (1/2) || z - e_y ||^2, with the same property.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from mexit.errors import UsageError
from mexit.train.methods.base import Outputs, TrainingMethod

ON = ("probs", "logits")


@dataclass
class MSE(TrainingMethod):
    """Cross-entropy, then the squared error in its place.

    Attributes:
        mu, attacked_mu: share of the squared error, of clean and of attacked images, in [0, 1].
        warm_up: share of the run that is trained with cross-entropy alone, in [0, 1).
        on: "probs" or "logits".
        clean_weight, attacked_weight: of the loss on clean and on attacked images.
    """

    inputs = "clean, or clean and attacked"
    default_attack = "none"
    attack_use = "optional"

    mu: float = 1.0
    attacked_mu: float = 0.5
    warm_up: float = 0.1
    on: str = "probs"
    clean_weight: float = 1.0
    attacked_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.on not in ON:
            raise UsageError(f"on must be one of {', '.join(ON)}, found {self.on}")
        if not (0 <= self.mu <= 1 and 0 <= self.attacked_mu <= 1 and 0 <= self.warm_up < 1):
            raise UsageError(
                f"mu and attacked_mu must lie in [0, 1], warm_up in [0, 1); found {self.mu}, {self.attacked_mu}, "
                f"{self.warm_up}"
            )

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """See `base.TrainingMethod`."""
        shares = {"clean": self.mu, "attacked": self.attacked_mu}
        weights = {"clean": self.clean_weight, "attacked": self.attacked_weight}
        terms = {}
        for view in outputs.views():
            mu = shares[view.name] if outputs.progress >= self.warm_up else 0.0
            weight = weights[view.name]
            terms[view.name] = weight * (1 - mu) * outputs.cross_entropy(view.logits).sum()
            error = squared_error(view.logits, outputs.labels, self.on, outputs.smoothing)
            terms[f"{view.name} mse"] = weight * mu * error.sum()
        return terms


def squared_error(logits: Tensor, labels: Tensor, on: str = "probs", smoothing: float = 0.0) -> Tensor:
    """Mean over samples of the scaled squared error: logits (E, B, C), labels (B,) to (E,)."""
    classes = logits.shape[-1]
    target = (1 - smoothing) * F.one_hot(labels, classes).to(logits.dtype) + smoothing / classes
    found, scale = (logits.softmax(dim=-1), classes / 2) if on == "probs" else (logits, 0.5)
    return scale * (found - target).square().sum(dim=-1).mean(dim=-1)
