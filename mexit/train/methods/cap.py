"""`cap`: confined adversarial polytopes (S. M. Hamidi, L. Ye, ICASSP 2024, arXiv 2401.07991).

    loss = sum_i [ CE(f_i(x), y) + (1/N) sum_k CE(f_i(x_k), y) + weight (1/N) sum_k | p_i(x_k) - c_i |^2 ]

The outputs of an exit on the ball around x form a polytope. N particles x_k find corners of it (see
`attacks.svgd`), and the last term pulls the corners towards their centre c_i, so that the polytope does not reach a
decision boundary. With c_i the mean of the corners it is (1 / 2 N^2) sum_{k,l} | p_k - p_l |^2.

Published, in the abstract: particles find corner points; cross-entropy plus a weighted distance of the corners from
the centre. Our readings, because neither code nor equations were available: every number; cross-entropy on clean
images and on the corners; the centre; probabilities for logits, because a network could shrink its logits; SVGD,
which the same authors use in AT-AKA, with its kernel-averaged gradient (`mix`); all exits share the particles, and
particle k maximises the loss of exit k, after the last exit of the first again, so that with N >= E every exit has a
corner of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from mexit.attacks.svgd import ParticleConfig, craft_particles
from mexit.errors import UsageError
from mexit.train.methods.base import Batch, Outputs, TrainingMethod


@dataclass
class CAP(TrainingMethod):
    """CAP. A step costs N (steps + 1) passes through the network.

    Attributes:
        particles: N.
        steps: number of steps of the particles; radius and step size are those of the attack.
        move: what separates the particles: "svgd", "spread" or "facet", see `attacks.svgd`.
        climbs: the loss that a particle maximises: of "each" particle's exit, or the "mean" over exits.
        mix: whether a particle follows SVGD's kernel average of all particles' gradients, or its own gradient.
        repulsion_weight, spread_weight: see `attacks.svgd.ParticleConfig`.
        weight: weight of the distance from the centre.
        warm_up: fraction of the run over which `weight` grows from 0, in [0, 1].
        on: distances between "probs" or between "logits"; for logits start with a tenth of the weight.
        centre: the "mean" of the corners, or the output on the "clean" image.
        clean_weight: weight of the cross-entropy on clean images.
    """

    default_attack = "average"

    particles: int = 4
    steps: int = 5
    move: Literal["svgd", "spread", "facet"] = "svgd"
    climbs: Literal["each", "mean"] = "each"
    mix: bool = True
    repulsion_weight: float = 0.1
    spread_weight: float = 0.01
    weight: float = 0.5
    warm_up: float = 0.1
    on: Literal["probs", "logits"] = "probs"
    centre: Literal["mean", "clean"] = "mean"
    clean_weight: float = 1.0

    def __post_init__(self) -> None:
        if not (self.weight >= 0 and self.clean_weight >= 0 and 0 <= self.warm_up <= 1):
            raise UsageError(
                "weight and clean_weight must be at least 0, and warm_up, a fraction of the run, in [0, 1]; found "
                f"{self.weight}, {self.clean_weight}, {self.warm_up}"
            )

    def craft(self, batch: Batch) -> Tensor | None:
        """The N particles, (N, B, C, H, W)."""
        if batch.attack is None:
            return None
        config = ParticleConfig(
            self.particles,
            replace(batch.attack.pgd, steps=self.steps),
            self.move,
            exits=tuple(range(1, batch.model.exits + 1)) if self.climbs == "each" else (),
            mix_gradients=self.mix,
            repulsion_weight=self.repulsion_weight,
            spread_weight=self.spread_weight,
            train_mode=batch.attack.train_mode,
        )
        return craft_particles(
            batch.model, batch.images, batch.labels, config,
            rng=batch.rng, index=batch.index, autocast=batch.autocast,
        )  # fmt: skip

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Cross-entropy on the corners and on clean images, and the distance of the corners from their centre."""
        corners = outputs.require_variants()
        losses = [outputs.cross_entropy(logits) for logits in corners]
        terms = {"attacked": sum(losses[1:], losses[0]).sum() / len(losses)}
        if self.weight:
            reached = min(1.0, outputs.step.progress / self.warm_up) if self.warm_up else 1.0
            terms["cap"] = self.weight * reached * self._distances(corners, outputs.clean).sum()
        if self.clean_weight:
            terms["clean"] = self.clean_weight * outputs.cross_entropy(outputs.clean).sum()
        return terms

    def _distances(self, corners: Tensor, clean: Tensor) -> Tensor:
        if self.on == "probs":
            corners, clean = corners.softmax(dim=-1), clean.softmax(dim=-1)
        return centre_distance(corners, clean if self.centre == "clean" else None)


def centre_distance(corners: Tensor, centre: Tensor | None = None) -> Tensor:
    """Squared distance from the centre, mean over corners and samples; gradients flow through both.

    Corners (N, E, B, C) and centre (E, B, C), None = their mean, to (E,).
    """
    middle = corners.mean(dim=0) if centre is None else centre
    return (corners - middle).square().sum(dim=-1).mean(dim=(0, 2))
