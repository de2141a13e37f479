"""`at-aka` and `cat-aka`: adversarial training with merged teachers (S. M. Hamidi, L. Ye, arXiv 2405.13324).

    loss = sum_i [ (1 - alpha) CE(f_i(x'), y) + alpha T^2 KL( softmax(z / T) || softmax(f_i(x') / T) ) ]

`at-aka`          z merges the logits of M robust teachers at x'; every exit learns it
`at-aka-teacher`  one of the teachers: cross-entropy on particle m of M. Without `--teacher`, `mexit train` first
                  trains M of these, with the backbone of the run and one exit
`cat-aka`         no teachers: z merges the last k exits of the network itself, detached, and particle m maximises
                  the loss of the m-th of them

x' is one of M particles of SVGD, which repel each other (see `attacks.svgd`). The merge of M logits z_m:

softmin       weighted mean, weights softmax_m( -CE(z_m, y) / tau ): teachers with a small loss on the sample count more
correct-mean  mean of the teachers that classify the sample correctly; if none does, the one with the smallest
              cross-entropy, and the student then learns from the label alone
min-logit     at class j the minimum over teachers of z_m[j] - z_m[y], so that the target is correct wherever one
              teacher is (as in KDCL, Q. Guo et al., CVPR 2020)
mean          mean of all, for comparison

Published, in the abstract and in pages about the paper: SVGD particles from uniform starts; every teacher trains on
other particles; one merged vector per sample, adapted to the teachers' performance, as the target of a smaller
student; CAT-AKA is an online form, with students that learn together without fixed teachers. Our readings, because
neither code nor equations were available: the rule of merging; the loss, alpha and T; teachers predict on the
student's x'; the student trains on one particle per sample, drawn anew each epoch; a teacher moves only its own
particle by its own gradient, while the other particles stay at their random starts and repel it, which costs one
attack instead of M; the exits of one network are CAT-AKA's students.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mexit.attacks.losses import exit_cross_entropy
from mexit.attacks.pgd import frozen, pgd, random_start
from mexit.attacks.svgd import ParticleConfig, craft_particles, stein_direction
from mexit.errors import UsageError
from mexit.train.methods.adversarial import Adversarial
from mexit.train.methods.base import Batch, Outputs, Setup, TrainingMethod

MergeRule = Literal["softmin", "correct-mean", "min-logit", "mean"]


@dataclass
class AtAkaTeacher(Adversarial):
    """Adversarial training on one of several particles.

    Attributes:
        clean_weight, attacked_weight: weights of the two cross-entropies.
        particle: number of the particle of this teacher, from 1.
        particles: M.
        repulsion_weight: see `attacks.svgd.ParticleConfig`.
    """

    inputs = "attacked"
    default_attack = "average"

    clean_weight: float = 0.0
    particle: int = 1
    particles: int = 2
    repulsion_weight: float = 0.1

    def __post_init__(self) -> None:
        if not 1 <= self.particle <= self.particles:
            raise UsageError(f"particle must be one of 1 to {self.particles}, found {self.particle}")

    def craft(self, batch: Batch) -> Tensor | None:
        """The particle of this teacher, (1, B, C, H, W)."""
        config = _particle_config(batch, self.particles, self.repulsion_weight)
        return None if config is None else craft_one_particle(batch, config, self.particle - 1)[None]


@dataclass
class MergedTeachers(TrainingMethod):
    """The part that `at-aka` and `cat-aka` share: the loss of students against merged logits."""

    inputs = "attacked"
    default_attack = "average"

    merge: MergeRule = "softmin"
    tau: float = 1.0
    alpha: float = 0.9
    temperature: float = 4.0
    repulsion_weight: float = 0.1

    def __post_init__(self) -> None:
        if not (self.tau > 0 and self.temperature > 0 and 0 <= self.alpha <= 1):
            raise UsageError(
                f"tau and temperature must be above 0 and alpha in [0, 1]; found {self.tau}, {self.temperature}, "
                f"{self.alpha}"
            )

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        attacked = outputs.require_attacked()
        merged = merge_logits(self.teacher_logits(outputs), outputs.labels, self.merge, self.tau)
        share = self.alpha * merged.trusted.float()
        hard = exit_cross_entropy(attacked, outputs.labels, outputs.step.label_smoothing)
        targets = (merged.logits / self.temperature).log_softmax(dim=-1)
        students = (attacked / self.temperature).log_softmax(dim=-1)
        soft = self.temperature**2 * (targets.exp() * (targets - students)).sum(dim=-1)
        attacked_term = outputs.weight_exits(((1 - share) * hard).mean(dim=1)).sum()
        return {"attacked": attacked_term, "kd": (share * soft).mean(dim=1).sum()}

    def teacher_logits(self, outputs: Outputs) -> Tensor:
        """The logits to merge, detached, (M, B, C)."""
        raise NotImplementedError


@dataclass
class AtAka(MergedTeachers):
    """AT-AKA's student, with one particle for every teacher.

    Attributes:
        merge: how the teachers' logits are merged: "softmin", "correct-mean", "min-logit" or "mean".
        tau: temperature of the merge "softmin".
        alpha: share of distillation in the loss, in [0, 1]; the rest is cross-entropy.
        temperature: T.
        repulsion_weight: see `attacks.svgd.ParticleConfig`.
        own_teachers: number of teachers that `mexit train` trains first where none is named.
    """

    uses_teachers = True

    own_teachers: int = 2

    def setup(self, run: Setup) -> None:
        super().setup(run)
        if not run.teachers:
            raise UsageError("at-aka needs robust teachers: name runs with --teacher RUN")

    def craft(self, batch: Batch) -> Tensor | None:
        """One particle per sample, (1, B, C, H, W)."""
        return _craft_one_of(batch, _particle_config(batch, len(self.run.teachers), self.repulsion_weight))

    def teacher_logits(self, outputs: Outputs) -> Tensor:
        """The teachers' logits on the attacked images."""
        assert outputs.attacked_images is not None
        images, teachers = outputs.attacked_images[0], self.run.teachers
        with torch.no_grad(), self.run.autocast():
            return torch.stack([teacher.forward_exit(images, teacher.exits) for teacher in teachers])


@dataclass
class CatAka(MergedTeachers):
    """The collaborative form: the merged logits of the last exits are the target of all exits.

    Attributes:
        merge: how the exits' logits are merged: "softmin", "correct-mean", "min-logit" or "mean".
        tau: temperature of the merge "softmin".
        alpha: share of distillation in the loss, in [0, 1]; smaller than at-aka's, because only the label adds
            knowledge from outside the network.
        temperature: T.
        repulsion_weight: see `attacks.svgd.ParticleConfig`.
        last: number of exits that are merged, k, and of particles.
    """

    alpha: float = 0.5
    last: int = 2

    def setup(self, run: Setup) -> None:
        super().setup(run)
        if not 2 <= self.last <= run.exits:
            raise UsageError(f"last must be 2 to the number of exits, here {run.exits}; found {self.last}")

    def craft(self, batch: Batch) -> Tensor | None:
        """One particle per sample, (1, B, C, H, W)."""
        exits = tuple(range(batch.model.exits - self.last + 1, batch.model.exits + 1))
        return _craft_one_of(batch, _particle_config(batch, self.last, self.repulsion_weight, exits))

    def teacher_logits(self, outputs: Outputs) -> Tensor:
        """The logits of the last exits, detached."""
        return outputs.require_attacked()[-self.last :].detach()


def _particle_config(
    batch: Batch, count: int, repulsion_weight: float, exits: tuple[int, ...] = ()
) -> ParticleConfig | None:
    """SVGD particles with the batch's attack; None without an attack."""
    if batch.attack is None:
        return None
    return ParticleConfig(
        count, batch.attack.pgd, exits=exits, mix_gradients=not exits, repulsion_weight=repulsion_weight,
        train_mode=batch.attack.train_mode,
    )  # fmt: skip


def _craft_one_of(batch: Batch, config: ParticleConfig | None) -> Tensor | None:
    """One randomly drawn particle per sample, (1, B, C, H, W)."""
    if config is None:
        return None
    particles = craft_particles(
        batch.model, batch.images, batch.labels, config, rng=batch.rng, index=batch.index, autocast=batch.autocast
    )
    chosen = (batch.rng.uniform("one particle", batch.index, ()) * len(particles)).long()
    return particles[chosen, torch.arange(len(chosen), device=chosen.device)][None]


def craft_one_particle(batch: Batch, config: ParticleConfig, particle: int) -> Tensor:
    """Move one particle of SVGD; the others stay at their random starts and repel it.

    Args:
        batch: images to attack.
        config: the particles; the loss is the mean over exits, the gradient that of the moving particle alone.
        particle: index of the particle that moves, from 0.

    Returns:
        (B, C, H, W), detached.
    """
    config = replace(config, mix_gradients=False)
    noise = [batch.rng.uniform(f"particle {m}", batch.index, batch.images.shape[1:]) for m in range(config.count)]
    others = [random_start(batch.images, config.pgd, start).clamp_(0, 1) for start in noise]

    def loss(attacked: Tensor) -> Tensor:
        with batch.autocast():
            logits = batch.model(attacked)
        return exit_cross_entropy(logits, batch.labels).mean(dim=0)

    def direction(attacked: Tensor, gradient: Tensor) -> Tensor:
        particles = torch.stack([attacked if m == particle else other for m, other in enumerate(others)]).flatten(2)
        gradients = torch.zeros_like(particles)
        gradients[particle] = gradient.float().flatten(1)
        return stein_direction(particles, gradients, config)[particle].reshape(attacked.shape)

    with frozen(batch.model, config.train_mode):
        turn = direction if config.count > 1 else None
        return pgd(batch.images, config.pgd, loss, noise[particle], turn)


@dataclass(frozen=True)
class MergedLogits:
    """The target of a student.

    Attributes:
        logits: (B, C) float32.
        trusted: (B,) bool; where False the student learns from the label alone.
    """

    logits: Tensor
    trusted: Tensor


def merge_logits(logits: Tensor, labels: Tensor, merge: MergeRule = "softmin", tau: float = 1.0) -> MergedLogits:
    """Merge the teachers' logits.

    Args:
        logits: of M teachers, (M, B, C).
        labels: (B,) int64.
        merge: how; see the module.
        tau: temperature of softmin, above 0; near 0 it takes the best teacher, for large values the mean.
    """
    logits = logits.float()
    trusted = torch.ones_like(labels, dtype=torch.bool)
    if merge == "mean":
        return MergedLogits(logits.mean(dim=0), trusted)
    if merge == "softmin":
        weights = (-exit_cross_entropy(logits, labels) / tau).softmax(dim=0)
        return MergedLogits((weights[..., None] * logits).sum(dim=0), trusted)
    if merge == "min-logit":
        label_column = labels.expand(len(logits), -1).unsqueeze(-1)
        return MergedLogits((logits - logits.gather(-1, label_column)).amin(dim=0), trusted)
    losses = exit_cross_entropy(logits, labels)
    correct = logits.argmax(dim=-1) == labels
    trusted = correct.any(dim=0)
    best = torch.zeros_like(correct).scatter(0, losses.argmin(dim=0, keepdim=True), True)
    selected = torch.where(trusted, correct, best).float()[..., None]
    return MergedLogits((selected * logits).sum(dim=0) / selected.sum(dim=0), trusted)
