"""`cmic`: deep learning constrained by conditional mutual information (E.-H. Yang et al., arXiv 2309.09123).

Outputs of a class are drawn together and those of different classes apart, at every exit e by itself:

    loss = sum_e w_e [ CE(f_e(x), y) + CE(f_e(x'), y) + weight KL( P_e || Q[e, y] ) - beta Gamma_e ]

P_e is the output on the attacked image, Q[e, y] the centroid of class y, constant in the gradient, and Gamma_e the
mean cross-entropy between outputs of different classes in the batch (`conditional_information`). In turn with the
network the centroids of the classes present move to their mean outputs: Q <- omega Q + (1 - omega) mean.

Certain, from the authors' public code of an adversarial version: the three terms and their gradients, centroids
from one pass over the training data and then a moving average over the batches, and two forms of attack: one on
cross-entropy for all terms (`attacks=1`; there it is written but not run), or a second one for the last two terms
that climbs KL - (beta / weight) Gamma (`attacks=2`, about twice the time). There weight is 0.05 and beta 0. Our
choices: weight 0.3 and beta 0.02, the sum over exits, the cross-entropy on clean images, a moving average over the
outputs that the loss has used, which saves a pass through the network after every step, and its omega: 0.999 for
0.9999, and less in the first steps, because the first centroids are those of a random network, all alike, and
drawing outputs there is the opposite of what is wanted. `--attack none` trains all terms on clean images, as the
paper does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mexit.attacks.multi_exit_attack import Attack, frozen, start_noise
from mexit.attacks.pgd import pgd
from mexit.errors import UsageError
from mexit.train.methods.base import Batch, Outputs, Setup, Sweep, TrainingMethod
from mexit.train.methods.cmi import (
    ClassStatistics,
    cross_entropy_to_other_classes,
    kl_to_centroids,
)

TIES = ("own", "last")


@dataclass
class CMIC(TrainingMethod):
    """Cross-entropy, concentration of classes and separation between them.

    Attributes:
        weight: lambda, of the KL to the centroid.
        beta: of Gamma; without a weight on KL, which bounds it, training is unstable.
        omega: share of the old centroids that is kept at each step, in [0, 1); at step t, from 0, at most
            (1 + t) / (10 + t).
        attacks: 1 = all terms on the same attacked image, 2 = KL and Gamma on one of their own.
        tie: the centroids that an exit is drawn to: its "own", or those of the "last" exit.
        exit_weights: w, one an exit; () = all 1.
        clean_weight: of the cross-entropy on clean images where there is an attack.
    """

    inputs = "clean and attacked, or clean"
    attack_use = "preferred"

    weight: float = 0.3
    beta: float = 0.02
    omega: float = 0.999
    attacks: int = 1
    tie: str = "own"
    exit_weights: tuple[float, ...] = ()
    clean_weight: float = 1.0
    centroids: Tensor | None = field(init=False, default=None)
    steps: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.attacks not in (1, 2) or self.tie not in TIES:
            raise UsageError(
                f"attacks must be 1 or 2 and tie one of {', '.join(TIES)}; found {self.attacks} and {self.tie}"
            )
        if self.weight < 0 or self.beta < 0 or not 0 <= self.omega < 1:
            raise UsageError(
                "weight and beta must be at least 0, omega in [0, 1); "
                f"found {self.weight}, {self.beta}, {self.omega}"
            )

    def setup(self, setup: Setup) -> None:
        """See `base.TrainingMethod`."""
        self.shape, self.device, self.team = (setup.exits, setup.classes), setup.device, setup.team
        if self.exit_weights and len(self.exit_weights) != setup.exits:
            raise UsageError(f"{setup.exits} exits need as many exit_weights, found {self.exit_weights}")
        self.exit_weight = torch.tensor(self.exit_weights or (1.0,) * setup.exits, device=setup.device)
        self.epoch_statistics = ClassStatistics(*self.shape, self.device)

    def begin_epoch(self, epoch: int, epochs: int, sweep: Sweep) -> None:  # noqa: ARG002
        """Forget the last epoch's measures; before the first, take the centroids."""
        self.epoch_statistics = ClassStatistics(*self.shape, self.device)
        if epoch == 0:
            first = ClassStatistics(*self.shape, self.device)
            for logits, labels in sweep(True):
                first.add(logits, labels)
            self.centroids = first.pooled(self.team).centroids()

    def craft(self, batch: Batch) -> Tensor | None:
        """The attack on cross-entropy, and the second one if there are two and centroids to flee from."""
        attacked = super().craft(batch)
        if attacked is None or batch.attack is None or self.attacks == 1 or self.centroids is None:
            return attacked
        return torch.cat([attacked, self._spread(batch, batch.attack)[None]])

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """See `base.TrainingMethod`."""
        weights = {"clean": self.clean_weight if outputs.attacked is not None else 1.0, "attacked": 1.0}
        terms = {
            view.name: weights[view.name] * (self.exit_weight * outputs.cross_entropy(view.logits)).sum()
            for view in outputs.views()
        }
        logits, labels = _drawn_together(outputs), outputs.labels
        divergence = kl_to_centroids(logits, self._targets(), labels).mean(dim=1)
        gamma = cross_entropy_to_other_classes(logits, labels, self.team).mean(dim=1)
        terms["cmi"] = self.weight * (self.exit_weight * divergence).sum()
        terms["gamma"] = -self.beta * (self.exit_weight * gamma).sum()
        return terms

    def stepped(self, outputs: Outputs) -> None:
        """Move the centroids of the classes in the batch towards their mean outputs there."""
        logits, labels = _drawn_together(outputs), outputs.labels
        batch = ClassStatistics(*self.shape, self.device)
        batch.add(logits, labels)
        batch = batch.pooled(self.team)
        self.epoch_statistics.merge(batch)
        omega = min(self.omega, (1 + self.steps) / (10 + self.steps))
        keep = torch.where(batch.counts > 0, omega, 1.0)[:, None]
        self.steps += 1
        self.centroids = keep * self._known() + (1 - keep) * batch.centroids()

    def state(self) -> dict[str, Tensor]:
        """See `base.TrainingMethod`."""
        steps = torch.tensor(self.steps)
        return {"centroids": self._known(), "steps": steps, **self.epoch_statistics.state()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `base.TrainingMethod`."""
        self.centroids, self.steps = state["centroids"].to(self.device), int(state["steps"])
        self.epoch_statistics.load(state)

    def report(self) -> dict[str, list[float]]:
        """CMI, Gamma and NCMI of the epoch's training images as the loss has seen them, from their logits."""
        found = self.epoch_statistics
        measures = {"cmi": found.cmi(), "gamma": found.gamma(), "ncmi": found.ncmi()}
        return {name: [round(float(value), 6) for value in values] for name, values in measures.items()}

    def _known(self) -> Tensor:
        """The centroids, (E, C, C) float64; uniform until the first pass."""
        return ClassStatistics(*self.shape, self.device).centroids() if self.centroids is None else self.centroids

    def _targets(self) -> Tensor:
        centroids = self._known()
        return centroids if self.tie == "own" else centroids[-1:].expand_as(centroids)

    def _spread(self, batch: Batch, attack: Attack) -> Tensor:
        """Images that climb KL - (beta / weight) Gamma over all exits, (B, C, H, W)."""
        share = self.beta / max(self.weight, 1e-6)

        def loss(attacked: Tensor) -> Tensor:
            with batch.autocast():
                logits = batch.model(attacked)
            away = kl_to_centroids(logits, self._targets(), batch.labels)
            apart = cross_entropy_to_other_classes(logits, batch.labels, self.team)
            return self.exit_weight @ (away - share * apart)

        noise = start_noise(batch.draw, "start cmi", batch.index, batch.images, attack.steps)
        with frozen(batch.model, attack.train_mode):
            return pgd(batch.images, attack.steps, loss, noise)


def _drawn_together(outputs: Outputs) -> Tensor:
    """The logits of KL and Gamma, (E, B, C): of the last attack, or of the clean images where there is none."""
    return outputs.views()[-1].logits if outputs.variants is None else outputs.variants[-1]
