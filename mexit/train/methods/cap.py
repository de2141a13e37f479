"""`cap`: confined adversarial polytopes (S. M. Hamidi, L. Ye, ICASSP 2024, arXiv 2401.07991).

    loss = sum_i [ (1/N) sum_k CE(f_i(x_k), y) + weight (1/N) sum_k | p_i(x_k) - c_i |^2 ],   k = 1 ... N

The outputs that an exit gives inside the ball around x form a polytope. N particles x_k find corners of it
(`attacks.particles`), and the second term pulls the corners to their centre c_i, so that the polytope does not
reach a decision boundary. With c_i the mean of the corners it is (1 / 2 N^2) sum_{k,l} | p_k - p_l |^2.

Certain, from the abstract: particles find corner points; cross-entropy plus a weighted distance of the corners
from the centre. Readings, for neither code nor equations were found: every number; cross-entropy on the corners
only (`clean_weight` adds the clean images); the centre; probabilities instead of logits, which a network could
simply shrink; which exits are climbed: all exits share the particles, particle k climbs exit k, and after the last
exit the first again, so that with N >= E every exit gets a corner of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from mexit.attacks.svgd import ParticleConfig, craft_particles
from mexit.errors import UsageError
from mexit.train.methods.base import Batch, Outputs, TrainingMethod

SPACES = ("probs", "logits")
CENTRES = ("mean", "clean")
CLIMBS = ("each", "mean")


@dataclass(frozen=True)
class CAP(TrainingMethod):
    """CAP. A step costs N (steps + 1) passes through the network.

    Attributes:
        particles: N.
        steps: of the particles; radius and step size are those of the attack.
        move: what keeps the particles apart: "svgd", "spread" or "facet", see `attacks.particles`.
        climbs: particles climb "each" its exit, or all the "mean" over exits.
        repulsion_weight, spread_weight: see `attacks.particles.ParticleConfig`.
        weight: of the distance from the centre.
        warm_up: share of the run over which `weight` grows from 0.
        on: distances of "probs" or of "logits"; for logits a tenth of the weight is a fair start.
        centre: "mean" of the corners, or the output on the "clean" image.
        clean_weight: of the cross-entropy on clean images.
    """

    inputs = "attacked"
    default_attack = "average"

    particles: int = 4
    steps: int = 5
    move: str = "svgd"
    climbs: str = "each"
    repulsion_weight: float = 0.1
    spread_weight: float = 0.01
    weight: float = 0.5
    warm_up: float = 0.1
    on: str = "probs"
    centre: str = "mean"
    clean_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.on not in SPACES or self.centre not in CENTRES or self.climbs not in CLIMBS:
            raise UsageError(
                f"on must be one of {', '.join(SPACES)}, centre one of {', '.join(CENTRES)}, climbs one of "
                f"{', '.join(CLIMBS)}; found {self.on}, {self.centre}, {self.climbs}"
            )
        if not (self.weight >= 0 and self.clean_weight >= 0 and 0 <= self.warm_up <= 1):
            raise UsageError(
                "weight and clean_weight must be at least 0, and warm_up, a share of the run, in [0, 1]; found "
                f"{self.weight}, {self.clean_weight}, {self.warm_up}"
            )

    def craft(self, batch: Batch) -> Tensor | None:
        """The N particles, (N, B, C, H, W)."""
        if batch.attack is None:
            return None
        each = self.climbs == "each"
        swarm = ParticleConfig(
            self.particles,
            replace(batch.attack.steps, count=self.steps),
            self.move,
            climbs=tuple(range(1, batch.model.exits + 1)) if each else (),
            mix=not each,
            repulsion_weight=self.repulsion_weight,
            spread_weight=self.spread_weight,
            train_mode=batch.attack.train_mode,
        )
        return craft_particles(
            batch.model,
            batch.images,
            batch.labels,
            swarm,
            draw=batch.draw,
            index=batch.index,
            autocast=batch.autocast,
        )

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """See `base.TrainingMethod`."""
        outputs.need_attacked()
        corners = outputs.variants
        assert corners is not None
        losses = [outputs.cross_entropy(logits) for logits in corners]
        terms = {"attacked": sum(losses[1:], losses[0]).sum() / len(losses)}
        if self.weight:
            grown = min(1.0, outputs.progress / self.warm_up) if self.warm_up else 1.0
            terms["cap"] = self.weight * grown * self._distances(corners, outputs.clean).sum()
        if self.clean_weight:
            terms["clean"] = self.clean_weight * outputs.cross_entropy(outputs.clean).sum()
        return terms

    def _distances(self, corners: Tensor, clean: Tensor) -> Tensor:
        if self.on == "probs":
            corners, clean = corners.softmax(dim=-1), clean.softmax(dim=-1)
        return centre_distance(corners, clean if self.centre == "clean" else None)


def centre_distance(corners: Tensor, centre: Tensor | None = None) -> Tensor:
    """Squared distance from the centre, mean over corners and samples; gradients flow through both.

    Args:
        corners: (N, E, B, C).
        centre: (E, B, C); None = the mean of the corners.

    Returns:
        (E,).
    """
    middle = corners.mean(dim=0) if centre is None else centre
    return (corners - middle).square().sum(dim=-1).mean(dim=(0, 2))
