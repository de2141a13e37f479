"""Several attacked versions of each image at once: particles in the ball that keep apart.

Each particle climbs its own loss (`ParticleConfig.climbs`); what keeps them apart is `ParticleConfig.move`:

svgd    Stein variational gradient descent (Q. Liu, D. Wang, NIPS 2016). Particle i of an image moves along
        phi_i = sum_j [ k(x_j, x_i) grad_j + grad_{x_j} k(x_j, x_i) ],   k(a, b) = exp(-|a - b|^2 / h),
        h the median of the squared distances between the image's particles, over ln(n + 1)
spread  each climbs CE + spread_weight |z - c|^2 on its logits z, c the mean of the image's particles, held fixed
facet   particle m climbs z_j - z_y, j the m-th most likely wrong class of the clean image: no two the same

S. M. Hamidi and L. Ye: AT-AKA (arXiv 2405.13324), which names SVGD, and CAP (ICASSP 2024, arXiv 2401.07991).
Certain, from the abstracts and from pages about them: several particles, uniform starts in the ball, SVGD,
projection. Readings, for no code was published: one kernel for each image over its own n particles; gradient and
repulsion are each brought to length 1 before they are added, because by pixel the gradient of a loss is tiny
beside the repulsion; without `mix` a particle follows its own gradient alone, which is what particles that climb
different losses need; and the whole of `spread` and `facet`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from mexit.attacks.losses import exit_losses
from mexit.attacks.multi_exit_attack import Autocast, frozen
from mexit.attacks.pgd import GradientTransform, PGDConfig, pgd
from mexit.attacks.rng import CounterRNG
from mexit.errors import UsageError
from mexit.models.multi_exit import MultiExit

MOVES = ("svgd", "spread", "facet")


@dataclass(frozen=True)
class ParticleConfig:
    """The particles of one image.

    Attributes:
        count: how many, n.
        steps: of each; they need a random start, and its rule makes the step: "sign", or "raw" for phi itself.
        move: what keeps them apart, one of `MOVES`.
        climbs: the exits, from 1, whose loss the particles climb in turn; () = all climb the mean over exits.
        mix: svgd's gradient: that of all particles by their kernel, as published, or of each particle alone.
        repulsion_weight: of svgd's repulsion. At 1 keeping apart costs as much of every step as climbing, and the
            attack falls behind FGSM; 0 without `mix` is n independent attacks.
        spread_weight: of the distance from the mean; on logits, so a little goes a long way.
        train_mode: see `objective.Attack`.
    """

    count: int
    steps: PGDConfig
    move: str = "svgd"
    climbs: tuple[int, ...] = ()
    mix: bool = True
    repulsion_weight: float = 0.1
    spread_weight: float = 0.01
    train_mode: bool = False

    def __post_init__(self) -> None:
        if self.move not in MOVES:
            raise UsageError(f"particles move by one of {', '.join(MOVES)}, found '{self.move}'")
        if self.count < 1 or self.repulsion_weight < 0 or self.spread_weight < 0:
            raise UsageError(
                "there must be at least one particle, and the weights of repulsion and spread at least 0; "
                f"found {self.count}, {self.repulsion_weight}, {self.spread_weight}"
            )
        if not self.steps.random_start or self.steps.restarts != 1:
            raise UsageError("particles need one random start each: from one point they would never part")


def craft_particles(
    model: MultiExit,
    images: Tensor,
    labels: Tensor,
    swarm: ParticleConfig,
    *,
    draw: CounterRNG,
    index: Tensor,
    autocast: Autocast = nullcontext,
) -> Tensor:
    """Attack a batch n times over.

    Args:
        model: its parameters are left untouched.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) int64.
        swarm: see `ParticleConfig`; V = its `count`.
        draw, index: randomness of the starts, by the samples' places in the data set, (B,).
        autocast: context in which the network runs.

    Returns:
        Attacked images, detached, (V, B, C, H, W).
    """
    if any(not 1 <= k <= model.exits for k in swarm.climbs):
        raise UsageError(f"particles climb exits 1 to {model.exits}, found {swarm.climbs}")
    noise = [draw.uniform(f"particle {m}", index, images.shape[1:]) for m in range(swarm.count)]
    with frozen(model, swarm.train_mode):
        loss = _loss(model, images, labels, swarm, autocast)
        turn = _svgd(swarm) if swarm.move == "svgd" and swarm.count > 1 else None
        # cat, unlike repeat, keeps the memory format of the images
        attacked = pgd(torch.cat([images] * swarm.count), swarm.steps, loss, torch.cat(noise), turn)
    return attacked.reshape(swarm.count, *images.shape)


def median_bandwidth(squares: Tensor) -> Tensor:
    """h of the kernel: squared distances (n, n, B) between n > 1 particles to (B,)."""
    n = len(squares)
    first, second = torch.triu_indices(n, n, offset=1, device=squares.device)
    return squares[first, second].median(dim=0).values.clamp_min(1e-12) / math.log(n + 1)


def stein_direction(particles: Tensor, gradients: Tensor, swarm: ParticleConfig) -> Tensor:
    """SVGD's phi with both of its parts at length 1: particles and gradients (n, B, D) to (n, B, D)."""
    centred = particles - particles.mean(dim=0)  # near 0, where differences lose no digits
    products = torch.einsum("ibd,jbd->ijb", centred, centred)
    own = products.diagonal().T
    squares = (own[:, None] + own[None, :] - 2 * products).clamp_min(0)
    h = median_bandwidth(squares)
    kernel = (-squares / h).exp()
    # sum_j k_ij (x_i - x_j); the factor 2 / h goes with the scaling below
    repulsion = kernel.sum(dim=1)[..., None] * centred - torch.einsum("ijb,jbd->ibd", kernel, centred)
    pull = torch.einsum("ijb,jbd->ibd", kernel, gradients) if swarm.mix else gradients
    return _unit(pull) + swarm.repulsion_weight * _unit(repulsion)


def _svgd(swarm: ParticleConfig) -> GradientTransform:
    def turn(attacked: Tensor, gradient: Tensor) -> Tensor:
        shape = (swarm.count, len(attacked) // swarm.count, -1)
        direction = stein_direction(attacked.reshape(shape), gradient.float().reshape(shape), swarm)
        return direction.reshape(attacked.shape)

    return turn


def _unit(vectors: Tensor) -> Tensor:
    length: Tensor = vectors.norm(dim=-1, keepdim=True)
    return vectors / length.clamp_min(1e-20)


def _loss(
    model: MultiExit, images: Tensor, labels: Tensor, swarm: ParticleConfig, autocast: Autocast
) -> Callable[[Tensor], Tensor]:
    """What the particles climb: (n * B, C, H, W) to one number each, (n * B,)."""
    own = [swarm.climbs[m % len(swarm.climbs)] for m in range(swarm.count)] if swarm.climbs else []
    alone = bool(own) and swarm.move != "spread"  # then no particle needs another exit than its own
    rivals = _rivals(model, images, labels, own or [0] * swarm.count, autocast) if swarm.move == "facet" else None

    def loss(attacked: Tensor) -> Tensor:
        with autocast():
            if alone:
                blocks = zip(attacked.chunk(swarm.count), own, strict=True)
                logits = torch.stack([model.forward_exit(block, k) for block, k in blocks])[None]
            else:
                logits = model(attacked)
                logits = logits.reshape(model.exits, swarm.count, -1, model.classes)
        values = _values(logits.float(), labels, rivals, swarm)
        if own and not alone:
            return torch.stack([values[k - 1, m] for m, k in enumerate(own)]).flatten()
        return values.mean(dim=0).flatten()

    return loss


def _values(logits: Tensor, labels: Tensor, rivals: Tensor | None, swarm: ParticleConfig) -> Tensor:
    """The loss of every exit, particle and sample: logits (e, n, B, C), rivals (n, B) to (e, n, B)."""
    if rivals is not None:
        truth = labels.expand_as(rivals)
        pair = torch.stack([rivals, truth], dim=-1).expand(*logits.shape[:-1], 2)
        rival, true = logits.gather(-1, pair).unbind(dim=-1)
        return rival - true
    losses = exit_losses(logits.flatten(1, 2), labels.repeat(swarm.count)).reshape(logits.shape[:-1])
    if swarm.move == "spread":
        centre = logits.mean(dim=1, keepdim=True).detach()
        losses = losses + swarm.spread_weight * (logits - centre).square().sum(dim=-1)
    return losses


def _rivals(model: MultiExit, images: Tensor, labels: Tensor, own: list[int], autocast: Autocast) -> Tensor:
    """For particle m the m-th most likely wrong class of each clean image, (n, B).

    `own` names the exit that judges, 0 = the mean of all. With more particles than wrong classes they start over.
    """
    with torch.no_grad(), autocast():
        logits = model(images).float()
    wrong = logits.scatter(-1, labels.expand(len(logits), -1).unsqueeze(-1), -math.inf)
    judged = [wrong[k - 1] if k else wrong.mean(dim=0) for k in own]
    count = logits.shape[-1] - 1
    return torch.stack([one.argsort(dim=-1, descending=True)[:, m % count] for m, one in enumerate(judged)])
