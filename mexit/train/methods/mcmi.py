"""`mcmi`: a network fine-tuned for more conditional mutual information, which makes a better teacher.

L. Ye, S. M. Hamidi, R. Tan, E.-H. Yang: Bayes conditional distribution estimation for knowledge distillation based
on conditional mutual information, ICLR 2024. Cross-entropy, and in the last epochs, summed over exits,

    loss = CE - weight KL( P || Q_y )        Q_y: mean output on class y in one pass over the data, detached

Certain, from the authors' code: this loss with weight 0.25 for most CIFAR-100 teachers, 20 epochs after 240,
centroids of one pass in train mode that then stay. Readings: the KL of a sample counts up to `cap`, for it has no
bound; at most half of a short run is fine-tuned; the learning rate follows the run's schedule, where the authors
begin a new one. With an attack there is cross-entropy on clean and on attacked images, and centroids and KL are
those of the attacked ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from mexit.errors import UsageError
from mexit.train.methods.base import Outputs, Setup, Sweep, TrainingMethod
from mexit.train.methods.cmi import ClassStatistics, kl_to_centroids

EXITS, SPREADS = ("all", "last"), ("cmi", "entropy")


@dataclass
class MCMI(TrainingMethod):
    """Cross-entropy, and then outputs of a class are pushed apart.

    Attributes:
        weight: of the KL; 0.15 to 0.25 is best for teachers, and from 0.6 they get worse.
        tune_epochs: how many epochs of the run, its last ones, are fine-tuned; at most half of them.
        refresh: take the centroids anew before each of those epochs.
        cap: of the KL of a sample, in nats.
        exits: which are fine-tuned: "all", or the "last" alone.
        spread: "cmi", or "entropy" = a control that only raises the entropy of the outputs.
        clean_weight, attacked_weight: of the two cross-entropies.
    """

    inputs = "clean, or clean and attacked"
    default_attack = "none"
    attack_use = "optional"

    weight: float = 0.25
    tune_epochs: float = 20.0
    refresh: bool = False
    cap: float = 2.0
    exits: str = "all"
    spread: str = "cmi"
    clean_weight: float = 1.0
    attacked_weight: float = 1.0
    centroids: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.exits not in EXITS or self.spread not in SPREADS:
            raise UsageError(
                f"exits must be one of {', '.join(EXITS)}, spread one of {', '.join(SPREADS)}; "
                f"found {self.exits}, {self.spread}"
            )
        if self.weight < 0 or self.tune_epochs < 0 or self.cap <= 0:
            raise UsageError(
                "weight and tune_epochs must be at least 0, cap above 0; "
                f"found {self.weight}, {self.tune_epochs}, {self.cap}"
            )

    def setup(self, setup: Setup) -> None:
        """See `base.TrainingMethod`."""
        self.shape, self.device, self.team = (setup.exits, setup.classes), setup.device, setup.team

    def begin_epoch(self, epoch: int, epochs: int, sweep: Sweep) -> None:
        """Take the centroids, once fine-tuning begins."""
        begin = epochs - min(int(self.tune_epochs), epochs // 2)
        if epoch == begin or (self.refresh and epoch > begin):
            statistics = ClassStatistics(*self.shape, self.device)
            for logits, labels in sweep(True):
                statistics.add(logits, labels)
            self.centroids = statistics.pooled(self.team).centroids().float()

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """See `base.TrainingMethod`."""
        weights = {"clean": self.clean_weight, "attacked": self.attacked_weight}
        views = outputs.views()
        terms = {view.name: weights[view.name] * outputs.cross_entropy(view.logits).sum() for view in views}
        if self.centroids is not None:
            first = 0 if self.exits == "all" else len(outputs.clean) - 1
            spread = self._spread(views[-1].logits, self.centroids, outputs.labels)[first:]
            terms[self.spread] = -self.weight * spread.mean(dim=1).sum()
        return terms

    def state(self) -> dict[str, Tensor]:
        """See `base.TrainingMethod`."""
        return {} if self.centroids is None else {"centroids": self.centroids}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `base.TrainingMethod`."""
        self.centroids = state["centroids"].to(self.device)

    def _spread(self, logits: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
        """What fine-tuning raises, (E, B)."""
        if self.spread == "entropy":
            logs = logits.log_softmax(dim=-1)
            return -(logs.exp() * logs).sum(dim=-1)
        return kl_to_centroids(logits, centroids, labels).clamp_max(self.cap)
