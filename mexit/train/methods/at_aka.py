"""`at-aka` and `cat-aka`: adversarial training by amalgamated teachers (S. M. Hamidi, L. Ye, arXiv 2405.13324).

    loss = sum_i [ (1 - alpha) CE(f_i(x'), y) + alpha T^2 KL( softmax(z / T) || softmax(f_i(x') / T) ) ]

`at-aka`          z amalgamates the logits of M robust teachers at x' (`amalgam`); every exit learns it
`at-aka-teacher`  one of them: cross-entropy on its own particle of M. `mexit train` makes M of these first, of
                  the same backbone with one exit, where no `--teacher` is named
`cat-aka`         no teachers: z amalgamates the last k exits of the network itself, detached, and particle m
                  climbs the m-th of them

x' is one of M particles that keep apart (`attacks.particles`), by SVGD.

Certain, from the abstract and pages about it: SVGD particles from uniform starts; teachers trained each on other
particles; one amalgamated vector a sample, adapted to the teachers' performance, as the target of a smaller
student; CAT-AKA is an online form, students that learn together without fixed teachers. Readings, for neither code
nor equations were found: the rule of amalgamation; the loss and alpha, T; teachers see the student's x'; the
student trains on one particle a sample, drawn anew each epoch; the exits of one network are CAT-AKA's students.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mexit.attacks.multi_exit_attack import exit_losses
from mexit.attacks.svgd import ParticleConfig, craft_particles
from mexit.errors import UsageError
from mexit.train.methods.adversarial import Adversarial
from mexit.train.methods.base import Batch, Outputs, Setup, TrainingMethod
from mexit.train.methods.teacher_merging import MERGES, amalgamate


@dataclass(frozen=True)
class AtAkaTeacher(Adversarial):
    """Adversarial training on one of several particles.

    Attributes:
        clean_weight, attacked_weight: of the two cross-entropies.
        particle: which, from 1.
        particles: how many.
        repulsion_weight: see `attacks.particles.ParticleConfig`.
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
        """Its particle, (1, B, C, H, W)."""
        particles = _craft(batch, self.particles, self.repulsion_weight)
        return None if particles is None else particles[self.particle - 1][None]


@dataclass
class _Amalgamating(TrainingMethod):
    """What at-aka and cat-aka share: everything but who is amalgamated, and on which particles."""

    inputs = "attacked"
    default_attack = "average"

    merge: str = "softmin"
    tau: float = 1.0
    alpha: float = 0.9
    temperature: float = 4.0
    repulsion_weight: float = 0.1
    known: Setup = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.merge not in MERGES:
            raise UsageError(f"merge must be one of {', '.join(MERGES)}, found '{self.merge}'")
        if not (self.tau > 0 and self.temperature > 0 and 0 <= self.alpha <= 1):
            raise UsageError(
                f"tau and temperature must be above 0 and alpha in [0, 1]; found {self.tau}, {self.temperature}, "
                f"{self.alpha}"
            )

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """See `base.TrainingMethod`."""
        attacked = outputs.need_attacked()
        amalgam = amalgamate(self._teaching(outputs), outputs.labels, self.merge, self.tau)
        share = self.alpha * amalgam.trusted.float()
        hard = exit_losses(attacked, outputs.labels, outputs.smoothing)
        targets = (amalgam.logits / self.temperature).log_softmax(dim=-1)
        learned = (attacked / self.temperature).log_softmax(dim=-1)
        soft = self.temperature**2 * (targets.exp() * (targets - learned)).sum(dim=-1)
        return {
            "attacked": ((1 - share) * hard).mean(dim=1).sum(),
            "amalgam": (share * soft).mean(dim=1).sum(),
        }

    def _teaching(self, outputs: Outputs) -> Tensor:
        """The logits that are amalgamated, detached, (M, B, C)."""
        raise NotImplementedError


@dataclass
class AtAka(_Amalgamating):
    """AT-AKA's student; as many particles as teachers.

    Attributes:
        merge: how several logits become one, see `amalgam`: "softmin", "correct-mean", "min-logit" or "mean".
        tau: temperature of the merge "softmin".
        alpha: share of the amalgam in the loss, in [0, 1]; the rest is the label's.
        temperature: T.
        repulsion_weight: see `attacks.particles.ParticleConfig`.
        own_teachers: how many teachers `mexit train` makes where none is named.
    """

    uses_teachers = True

    own_teachers: int = 2

    def setup(self, setup: Setup) -> None:
        """See `base.TrainingMethod`."""
        if not setup.teachers:
            raise UsageError("at-aka needs robust networks that teach: name runs with --teacher RUN")
        self.known = setup

    def craft(self, batch: Batch) -> Tensor | None:
        """One particle a sample, (1, B, C, H, W)."""
        return _one_each(batch, _craft(batch, len(self.known.teachers), self.repulsion_weight))

    def _teaching(self, outputs: Outputs) -> Tensor:
        assert outputs.attacked_images is not None
        images, teachers = outputs.attacked_images[0], self.known.teachers
        with torch.no_grad(), self.known.autocast():
            return torch.stack([teacher.forward_exit(images, teacher.exits) for teacher in teachers])


@dataclass
class CatAka(_Amalgamating):
    """Its collaborative form: the last exits teach all exits.

    Attributes:
        merge: how several logits become one, see `amalgam`: "softmin", "correct-mean", "min-logit" or "mean".
        tau: temperature of the merge "softmin".
        alpha: share of the amalgam in the loss, in [0, 1]; less than at-aka's, for here only the label brings
            news from outside.
        temperature: T.
        repulsion_weight: see `attacks.particles.ParticleConfig`.
        last: how many exits teach, k; as many particles.
    """

    alpha: float = 0.5
    last: int = 2

    def setup(self, setup: Setup) -> None:
        """See `base.TrainingMethod`."""
        if not 2 <= self.last <= setup.exits:
            raise UsageError(f"last must be 2 to the number of exits, here {setup.exits}; found {self.last}")
        self.known = setup

    def craft(self, batch: Batch) -> Tensor | None:
        """One particle a sample, (1, B, C, H, W)."""
        climbs = tuple(range(batch.model.exits - self.last + 1, batch.model.exits + 1))
        return _one_each(batch, _craft(batch, self.last, self.repulsion_weight, climbs))

    def _teaching(self, outputs: Outputs) -> Tensor:
        return outputs.need_attacked()[-self.last :].detach()


def _craft(batch: Batch, count: int, repulsion_weight: float, climbs: tuple[int, ...] = ()) -> Tensor | None:
    """SVGD particles under the batch's attack, (count, B, C, H, W)."""
    if batch.attack is None:
        return None
    swarm = ParticleConfig(
        count,
        batch.attack.steps,
        climbs=climbs,
        mix=not climbs,
        repulsion_weight=repulsion_weight,
        train_mode=batch.attack.train_mode,
    )
    return craft_particles(
        batch.model, batch.images, batch.labels, swarm, draw=batch.draw, index=batch.index, autocast=batch.autocast
    )


def _one_each(batch: Batch, particles: Tensor | None) -> Tensor | None:
    """For each sample one of its particles, drawn by its place: (V, B, C, H, W) to (1, B, C, H, W)."""
    if particles is None:
        return None
    drawn = batch.draw.uniform("one particle", batch.index, ())
    chosen = (drawn * len(particles)).long()
    return particles[chosen, torch.arange(len(chosen), device=chosen.device)][None]
