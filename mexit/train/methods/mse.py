"""`mse`: training with the Brier score, for teachers whose outputs are closer to class probabilities.

S. M. Hamidi, X. Deng, R. Tan, L. Ye, A. H. Salamah: how to train the teacher model for effective knowledge
distillation, ECCV 2024. Summed over exits,

    loss = (1-mu) CE + mu (C/2) || softmax(z) - e_y ||^2

mu is 0 during `warm_up`, and then grows linearly to its final value, by default until the end of the run.

Published: the squared error between probabilities and the one-hot label. Our choices: the sum over classes times
C/2, whose gradient at a uniform output is that of cross-entropy (the published mean over classes is C times smaller,
too small to begin with); the warm-up and the linear growth, because a confidently wrong output has almost no gradient
of the squared error, and a network trained with it alone can collapse to one class; half of the cross-entropy stays on
attacked images, of which many are confidently wrong; attacks maximise cross-entropy. Whether the published runs took
the error of probabilities or of logits is unknown: `on=logits` takes (1/2) || z - e_y ||^2, which has the same
minimiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from mexit.errors import UsageError
from mexit.train.methods.base import Outputs, TrainingMethod


@dataclass
class MSE(TrainingMethod):
    """Cross-entropy that the squared error gradually replaces.

    Attributes:
        mu, attacked_mu: final share of the squared error on clean and on attacked images, in [0, 1].
        warm_up: fraction of the run with cross-entropy alone, in [0, 1).
        ramp: fraction of the rest of the run over which the share grows to its final value, in [0, 1]; 0 = at once.
        on: "probs" or "logits".
        clean_weight, attacked_weight: weights of the loss on clean and on attacked images.
    """

    inputs = "clean, or clean and attacked"
    default_attack = "none"
    attack_use = "optional"

    mu: float = 1.0
    attacked_mu: float = 0.5
    warm_up: float = 0.1
    ramp: float = 1.0
    on: Literal["probs", "logits"] = "probs"
    clean_weight: float = 1.0
    attacked_weight: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.mu <= 1 and 0 <= self.attacked_mu <= 1 and 0 <= self.warm_up < 1 and 0 <= self.ramp <= 1):
            raise UsageError(
                "mu, attacked_mu and ramp must lie in [0, 1], warm_up in [0, 1); found "
                f"{self.mu}, {self.attacked_mu}, {self.ramp}, {self.warm_up}"
            )

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        final = {"clean": self.mu, "attacked": self.attacked_mu}
        weights = {"clean": self.clean_weight, "attacked": self.attacked_weight}
        reached = self._reached(outputs.step.progress)
        terms = {}
        for view in outputs.views():
            mu, weight = final[view.name] * reached, weights[view.name]
            terms[view.name] = weight * (1 - mu) * outputs.cross_entropy(view.logits).sum()
            error = squared_error(view.logits, outputs.labels, self.on, outputs.step.label_smoothing)
            terms[f"{view.name} mse"] = weight * mu * error.sum()
        return terms

    def _reached(self, progress: float) -> float:
        """The fraction of its final value that mu has at this progress of the run, in [0, 1]."""
        if progress < self.warm_up:
            return 0.0
        length = self.ramp * (1 - self.warm_up)
        return min(1.0, (progress - self.warm_up) / length) if length else 1.0


def squared_error(logits: Tensor, labels: Tensor, on: str = "probs", smoothing: float = 0.0) -> Tensor:
    """The scaled squared error, mean over samples.

    Args:
        logits: (E, B, C).
        labels: (B,) int64.
        on: "probs" or "logits".
        smoothing: of the labels, in [0, 1).

    Returns:
        (E,).
    """
    classes = logits.shape[-1]
    target = (1 - smoothing) * F.one_hot(labels, classes).to(logits.dtype) + smoothing / classes
    outputs, scale = (logits.softmax(dim=-1), classes / 2) if on == "probs" else (logits, 0.5)
    return scale * (outputs - target).square().sum(dim=-1).mean(dim=-1)
