"""`mcmi`: fine-tuning that raises the conditional mutual information of a network, for better teachers.

L. Ye, S. M. Hamidi, R. Tan, E.-H. Yang: Bayes conditional distribution estimation for knowledge distillation based
on conditional mutual information, ICLR 2024. Training with cross-entropy, and in the last epochs, summed over exits,

    loss = CE - weight KL( P || Q_y )        Q_y: mean output on class y in one pass over the data, detached

Published, in the authors' code: this loss with weight 0.25 for most CIFAR-100 teachers, 20 epochs after 240, and
centroids of one pass in train mode that then stay. Our choices: the KL of a sample is capped (`cap`), because it has
no bound; at most half of a short run is fine-tuned; the learning rate follows the run's schedule, where the authors
begin a new one. With an attack there is cross-entropy on clean and on attacked images, and centroids and KL are
those of the attacked images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from mexit.errors import UsageError
from mexit.train.methods.base import Outputs, TrainingMethod, TrainLogits
from mexit.train.methods.cmi import ClassStatistics, kl_to_centroids


@dataclass
class MCMI(TrainingMethod):
    """Cross-entropy, then fine-tuning that spreads the outputs of a class.

    Attributes:
        weight: weight of the KL; 0.15 to 0.25 gives the best teachers, 0.6 and more gives worse ones.
        tune_epochs: number of epochs, at the end of the run, that are fine-tuned; at most half of the run.
        refresh: recompute the centroids before each of those epochs.
        cap: largest KL of a sample, in nats.
        exits: the exits that are fine-tuned: "all" or the "last".
        spread: "cmi", or "entropy": a control that raises the entropy of the outputs instead.
        clean_weight, attacked_weight: weights of the two cross-entropies.
    """

    inputs = "clean, or clean and attacked"
    default_attack = "none"
    attack_use = "optional"

    weight: float = 0.25
    tune_epochs: int = 20
    refresh: bool = False
    cap: float = 2.0
    exits: Literal["all", "last"] = "all"
    spread: Literal["cmi", "entropy"] = "cmi"
    clean_weight: float = 1.0
    attacked_weight: float = 1.0
    centroids: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.weight < 0 or self.tune_epochs < 0 or self.cap <= 0:
            raise UsageError(
                "weight and tune_epochs must be at least 0, cap above 0; "
                f"found {self.weight}, {self.tune_epochs}, {self.cap}"
            )

    def begin_epoch(self, epoch: int, epochs: int, train_logits: TrainLogits) -> None:
        """Compute the centroids when fine-tuning begins."""
        first = epochs - min(self.tune_epochs, epochs // 2)
        # In a run by the clock `epochs` is an estimate, so `first` may move back over `epoch`.
        if epoch >= first and (self.centroids is None or self.refresh):
            statistics = ClassStatistics(self.run.exits, self.run.classes, self.run.device)
            for logits, labels in train_logits(True):
                statistics.add(logits, labels)
            self.centroids = statistics.summed_over(self.run.process_group).centroids().float()

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Cross-entropy, and minus the spread while fine-tuning."""
        weights = {"clean": self.clean_weight, "attacked": self.attacked_weight}
        views = outputs.views()
        terms = {view.name: weights[view.name] * outputs.cross_entropy(view.logits).sum() for view in views}
        if self.centroids is not None:
            first = 0 if self.exits == "all" else len(outputs.clean) - 1
            spread = self._spread(views[-1].logits, self.centroids, outputs.labels)[first:]
            terms[self.spread] = -self.weight * spread.mean(dim=1).sum()
        return terms

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.centroids is None else {"centroids": self.centroids}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.centroids = state["centroids"].to(self.run.device)

    def _spread(self, logits: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
        """The quantity that fine-tuning raises, (E, B)."""
        if self.spread == "entropy":
            logs = logits.log_softmax(dim=-1)
            return -(logs.exp() * logs).sum(dim=-1)
        return kl_to_centroids(logits, centroids, labels).clamp_max(self.cap)
