"""`cmic`: deep learning constrained by conditional mutual information (E.-H. Yang et al., arXiv 2309.09123).

The outputs of a class are concentrated and those of different classes are separated, at every exit e separately:

    loss = sum_e w_e [ CE(f_e(x), y) + CE(f_e(x'), y) + weight KL( P_e || Q[e, y] ) - beta Gamma_e ]

P_e is the output on the attacked image, Q[e, y] the centroid of class y, constant in the gradient, and Gamma_e the
mean cross-entropy between outputs of different classes in the batch (see `cmi`). After every step the centroids of
the classes in the batch move towards their mean outputs: Q <- omega Q + (1 - omega) mean.

Published, in the authors' code of an adversarial version: the three terms and their gradients; centroids from one
pass over the training data and then a moving average over the batches; and two forms of attack: one on cross-entropy
for all terms (`attacks=1`; the code contains it but does not run it), or a second one for the last two terms that
maximises KL - (beta / weight) Gamma, crafted in train mode with BatchNorm's running statistics fixed (`attacks=2`,
about twice the time). Their weight is 0.05 and their beta 0.

Our choices: weight 0.3 and beta 0.02; the sum over exits; the cross-entropy on clean images; the moving average
takes the outputs that the loss has used, which saves a pass through the network per step; the first centroids are
those of images attacked on cross-entropy, with `attacks=2` too; omega is 0.999 for 0.9999, and smaller in the first
steps, because the first centroids are those of a random network and nearly equal. `--attack none` trains all terms
on clean images, as the paper does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from mexit.attacks.pgd import Attack, frozen, pgd, start_noise
from mexit.errors import UsageError
from mexit.train.methods.base import Batch, Outputs, Setup, TrainingMethod, TrainLogits
from mexit.train.methods.cmi import ClassStatistics, cross_entropy_to_other_classes, kl_to_centroids


@dataclass
class CMIC(TrainingMethod):
    """Cross-entropy, concentration of classes and separation between them.

    Attributes:
        weight: weight of the KL to the centroid (lambda in the paper).
        beta: weight of Gamma; training is unstable with beta and without `weight`, which bounds it.
        omega: share of the old centroids that is kept at each step, in [0, 1); at step t, from 0, at most
            (1 + t) / (10 + t).
        attacks: 1 = all terms on the same attacked image, 2 = KL and Gamma on a second attacked image.
        tie: the centroids of an exit: its "own", or those of the "last" exit.
        exit_weights: w, one per exit; () = all 1.
        clean_weight: weight of the cross-entropy on clean images in a run with an attack.
    """

    inputs = "clean and attacked, or clean"
    attack_use = "preferred"

    weight: float = 0.3
    beta: float = 0.02
    omega: float = 0.999
    attacks: Literal[1, 2] = 1
    tie: Literal["own", "last"] = "own"
    exit_weights: tuple[float, ...] = ()
    clean_weight: float = 1.0
    centroids: Tensor | None = field(init=False, default=None)
    steps: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.weight < 0 or self.beta < 0 or not 0 <= self.omega < 1:
            raise UsageError(
                f"weight and beta must be at least 0, omega in [0, 1); found {self.weight}, {self.beta}, {self.omega}"
            )

    def setup(self, run: Setup) -> None:
        super().setup(run)
        if self.exit_weights and len(self.exit_weights) != run.exits:
            raise UsageError(f"exit_weights needs one weight for each of {run.exits} exits: {self.exit_weights}")
        self.exit_weight = torch.tensor(self.exit_weights or (1.0,) * run.exits, device=run.device)
        self.epoch_statistics = self._statistics()

    def begin_epoch(self, epoch: int, epochs: int, train_logits: TrainLogits) -> None:  # noqa: ARG002
        """Reset the epoch's measures; before the first epoch, compute the centroids."""
        self.epoch_statistics = self._statistics()
        if epoch == 0:
            first = self._statistics()
            for logits, labels in train_logits(True):
                first.add(logits, labels)
            self.centroids = first.summed_over(self.run.process_group).centroids()

    def craft(self, batch: Batch) -> Tensor | None:
        """The attack on cross-entropy; with `attacks=2`, once there are centroids, the second attack too."""
        attacked = super().craft(batch)
        if attacked is None or batch.attack is None or self.attacks == 1 or self.centroids is None:
            return attacked
        return torch.cat([attacked, self._craft_on_cmi(batch, batch.attack)[None]])

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Cross-entropy on clean and on attacked images, concentration ("cmi") and separation ("gamma")."""
        weights = {"clean": self.clean_weight if outputs.variants is not None else 1.0, "attacked": 1.0}
        terms = {
            view.name: weights[view.name] * (self.exit_weight * outputs.cross_entropy(view.logits)).sum()
            for view in outputs.views()
        }
        logits, labels = _concentrated(outputs), outputs.labels
        kl = kl_to_centroids(logits, self._targets(), labels).mean(dim=1)
        gamma = cross_entropy_to_other_classes(logits, labels, self.run.process_group).mean(dim=1)
        terms["cmi"] = self.weight * (self.exit_weight * kl).sum()
        terms["gamma"] = -self.beta * (self.exit_weight * gamma).sum()
        return terms

    def after_step(self, outputs: Outputs) -> None:
        """Move the centroids of the classes in the batch towards their mean outputs."""
        batch = self._statistics()
        batch.add(_concentrated(outputs), outputs.labels)
        batch = batch.summed_over(self.run.process_group)
        self.epoch_statistics.merge(batch)
        omega = min(self.omega, (1 + self.steps) / (10 + self.steps))
        kept = torch.where(batch.counts > 0, omega, 1.0)[:, None]
        self.steps += 1
        self.centroids = kept * self._centroids() + (1 - kept) * batch.centroids()

    def state_dict(self) -> dict[str, Tensor]:
        steps = torch.tensor(self.steps)
        return {"centroids": self._centroids(), "steps": steps, **self.epoch_statistics.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.centroids, self.steps = state["centroids"].to(self.run.device), int(state["steps"])
        self.epoch_statistics.load_state_dict(state)

    def report(self) -> dict[str, list[float]]:
        """CMI, Gamma and NCMI of the epoch's training images, from the logits of the loss."""
        statistics = self.epoch_statistics
        measures = {"cmi": statistics.cmi(), "gamma": statistics.gamma(), "ncmi": statistics.ncmi()}
        return {name: [round(float(value), 6) for value in values] for name, values in measures.items()}

    def _statistics(self) -> ClassStatistics:
        return ClassStatistics(self.run.exits, self.run.classes, self.run.device)

    def _centroids(self) -> Tensor:
        """The centroids, (E, C, C) float64; uniform before the first pass."""
        return self._statistics().centroids() if self.centroids is None else self.centroids

    def _targets(self) -> Tensor:
        centroids = self._centroids()
        return centroids if self.tie == "own" else centroids[-1:].expand_as(centroids)

    def _craft_on_cmi(self, batch: Batch, attack: Attack) -> Tensor:
        """Images that maximise KL - (beta / weight) Gamma over all exits, (B, C, H, W)."""
        run = self.run
        model, autocast = (batch.model, batch.autocast) if run.model is None else (run.model, run.autocast)
        factor = self.beta / max(self.weight, 1e-6)

        def loss(attacked: Tensor) -> Tensor:
            with autocast():
                logits = model(attacked)
            kl = kl_to_centroids(logits, self._targets(), batch.labels)
            gamma = cross_entropy_to_other_classes(logits, batch.labels, self.run.process_group)
            return self.exit_weight @ (kl - factor * gamma)

        noise = start_noise(batch.rng, "start cmi", batch.index, batch.images, attack.pgd)
        with frozen(model, train_mode=True), fixed_running_statistics(model):
            return pgd(batch.images, attack.pgd, loss, noise)


@contextmanager
def fixed_running_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in train mode uses batch statistics and leaves its running statistics unchanged."""
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and layer.track_running_stats
    ]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def _concentrated(outputs: Outputs) -> Tensor:
    """The logits of KL and Gamma, (E, B, C): of the last attack, or of the clean images in a run without one."""
    return outputs.clean if outputs.variants is None else outputs.variants[-1]
