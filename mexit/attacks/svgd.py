"""Particle attacks: several attacked versions of each image that are kept apart from each other.

Each particle maximises the loss of its own exits (`ParticleConfig.exits`). `ParticleConfig.diversity` keeps the n
particles of an image apart:

svgd    Stein variational gradient descent (Q. Liu, D. Wang, NIPS 2016). Particle i of an image moves along
        phi_i = sum_j [ k(x_j, x_i) grad_j + grad_{x_j} k(x_j, x_i) ],   k(a, b) = exp(-|a - b|^2 / h),
        h = median of the squared distances between the particles of the image / ln(n + 1)
spread  each particle maximises CE + spread_weight |z - c|^2, z its logits and c their mean over the image's particles,
        held constant
facet   particle m maximises z_j - z_y, j the m-th most likely wrong class of the clean image

S. M. Hamidi and L. Ye: AT-AKA (arXiv 2405.13324) and CAP (ICASSP 2024, arXiv 2401.07991).
Certain, from the abstracts and from pages about them: several particles, uniform starts in the ball, SVGD, projection.
Readings, since no code was published: one kernel per image over its own n particles; gradient and repulsion are each
scaled to length 1 before they are added, because per pixel the gradient of a loss is tiny beside the repulsion; without
`mix_gradients` a particle follows its own gradient alone, as particles with different losses need; all of `spread` and
`facet`.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from mexit.attacks.losses import exit_cross_entropy
from mexit.attacks.pgd import Autocast, GradientTransform, LossFn, PGDConfig, frozen, pgd
from mexit.attacks.rng import CounterRNG
from mexit.errors import UsageError
from mexit.models.multi_exit import MultiExit

DIVERSITIES = ("svgd", "spread", "facet")


@dataclass(frozen=True)
class ParticleConfig:
    """The particles of each image.

    Attributes:
        count: number of particles, n.
        pgd: parameters of each particle's attack. It needs one random start. With the rule "sign" a particle moves
            along sign(phi), with "raw" along phi.
        diversity: what keeps the particles apart, one of `DIVERSITIES`.
        exits: exits, from 1, that the particles attack in turn; () = every particle attacks the mean over exits.
        mix_gradients: svgd: True = kernel-weighted sum of all gradients, as published; False = each particle's own.
        repulsion_weight: svgd: weight of the repulsion. At 1 the attack falls behind FGSM, because half of every step
            serves the distance. 0 without `mix_gradients` gives n independent attacks.
        spread_weight: spread: weight of the squared distance of the logits from their mean.
        train_mode: see `pgd.Attack`.
    """

    count: int
    pgd: PGDConfig
    diversity: str = "svgd"
    exits: tuple[int, ...] = ()
    mix_gradients: bool = True
    repulsion_weight: float = 0.1
    spread_weight: float = 0.01
    train_mode: bool = False

    def __post_init__(self) -> None:
        if self.diversity not in DIVERSITIES:
            raise UsageError(f"particles are kept apart by one of {', '.join(DIVERSITIES)}, found '{self.diversity}'")
        if self.count < 1 or self.repulsion_weight < 0 or self.spread_weight < 0:
            raise UsageError(
                "there must be at least one particle, and the weights of repulsion and spread must be at least 0; "
                f"found {self.count}, {self.repulsion_weight}, {self.spread_weight}"
            )
        if not self.pgd.random_start or self.pgd.restarts != 1:
            raise UsageError("particles need one random start each: from the same point they stay together")


def craft_particles(
    model: MultiExit,
    images: Tensor,
    labels: Tensor,
    config: ParticleConfig,
    *,
    rng: CounterRNG,
    index: Tensor,
    autocast: Autocast = nullcontext,
) -> Tensor:
    """Attack a batch with n particles per image. The arguments but `config` are those of `pgd.craft`.

    Returns:
        Attacked images, detached, (n, B, C, H, W).

    Raises:
        UsageError: `config.exits` names an exit that the network does not have.
    """
    if any(not 1 <= k <= model.exits for k in config.exits):
        raise UsageError(f"particles attack exits 1 to {model.exits}, found {config.exits}")
    noise = [rng.uniform(f"particle {m}", index, images.shape[1:]) for m in range(config.count)]
    with frozen(model, config.train_mode):
        loss_fn = _loss_fn(model, images, labels, config, autocast)
        transform = _stein_transform(config) if config.diversity == "svgd" and config.count > 1 else None
        # cat, unlike repeat, keeps the memory format of the images
        attacked = pgd(torch.cat([images] * config.count), config.pgd, loss_fn, torch.cat(noise), transform)
    return attacked.reshape(config.count, *images.shape)


def median_bandwidth(squares: Tensor) -> Tensor:
    """The bandwidth h of the kernel: squared distances (n, n, B) between n > 1 particles to (B,)."""
    n = len(squares)
    first, second = torch.triu_indices(n, n, offset=1, device=squares.device)
    return squares[first, second].median(dim=0).values.clamp_min(1e-12) / math.log(n + 1)


def stein_direction(particles: Tensor, gradients: Tensor, config: ParticleConfig) -> Tensor:
    """SVGD's phi with both parts scaled to length 1: particles and gradients (n, B, D) to (n, B, D)."""
    centred = particles - particles.mean(dim=0)  # near 0, where differences lose no digits
    products = torch.einsum("ibd,jbd->ijb", centred, centred)
    norms = products.diagonal().T
    squares = (norms[:, None] + norms[None, :] - 2 * products).clamp_min(0)
    h = median_bandwidth(squares)
    kernel = (-squares / h).exp()
    # sum_j k_ij (x_i - x_j); the factor 2 / h vanishes in the scaling below
    repulsion = kernel.sum(dim=1)[..., None] * centred - torch.einsum("ijb,jbd->ibd", kernel, centred)
    attraction = torch.einsum("ijb,jbd->ibd", kernel, gradients) if config.mix_gradients else gradients
    return _unit(attraction) + config.repulsion_weight * _unit(repulsion)


def _stein_transform(config: ParticleConfig) -> GradientTransform:
    def transform(attacked: Tensor, gradient: Tensor) -> Tensor:
        shape = (config.count, len(attacked) // config.count, -1)
        direction = stein_direction(attacked.reshape(shape), gradient.float().reshape(shape), config)
        return direction.reshape(attacked.shape)

    return transform


def _unit(vectors: Tensor) -> Tensor:
    length: Tensor = vectors.norm(dim=-1, keepdim=True)
    return vectors / length.clamp_min(1e-20)


def _loss_fn(model: MultiExit, images: Tensor, labels: Tensor, config: ParticleConfig, autocast: Autocast) -> LossFn:
    """The loss of all particles: (n * B, C, H, W) to (n * B,)."""
    exits = [config.exits[m % len(config.exits)] for m in range(config.count)] if config.exits else []
    single = bool(exits) and config.diversity != "spread"  # then a particle needs the logits of its own exit only
    rivals = None
    if config.diversity == "facet":
        rivals = _rival_classes(model, images, labels, exits or [0] * config.count, autocast)

    def loss_fn(attacked: Tensor) -> Tensor:
        with autocast():
            if single:
                blocks = zip(attacked.chunk(config.count), exits, strict=True)
                logits = torch.stack([model.forward_exit(block, k) for block, k in blocks])[None]
            else:
                logits = model(attacked)
                logits = logits.reshape(model.exits, config.count, -1, model.classes)
        losses = _losses(logits.float(), labels, rivals, config)
        if exits and not single:
            return torch.stack([losses[k - 1, m] for m, k in enumerate(exits)]).flatten()
        return losses.mean(dim=0).flatten()

    return loss_fn


def _losses(logits: Tensor, labels: Tensor, rivals: Tensor | None, config: ParticleConfig) -> Tensor:
    """The loss of every exit, particle and sample: logits (e, n, B, C), rivals (n, B) to (e, n, B)."""
    if rivals is not None:
        pair = torch.stack([rivals, labels.expand_as(rivals)], dim=-1).expand(*logits.shape[:-1], 2)
        rival_logits, true_logits = logits.gather(-1, pair).unbind(dim=-1)
        return rival_logits - true_logits
    losses = exit_cross_entropy(logits.flatten(1, 2), labels.repeat(config.count)).reshape(logits.shape[:-1])
    if config.diversity == "spread":
        centre = logits.mean(dim=1, keepdim=True).detach()
        losses = losses + config.spread_weight * (logits - centre).square().sum(dim=-1)
    return losses


def _rival_classes(model: MultiExit, images: Tensor, labels: Tensor, exits: list[int], autocast: Autocast) -> Tensor:
    """For particle m the m-th most likely wrong class of each clean image, (n, B).

    `exits` names the exit that ranks the classes for each particle, 0 = the mean over exits. With more particles than
    wrong classes the classes repeat.
    """
    with torch.no_grad(), autocast():
        logits = model(images).float()
    wrong = logits.scatter(-1, labels.expand(len(logits), -1).unsqueeze(-1), -math.inf)
    ranked_by = [wrong[k - 1] if k else wrong.mean(dim=0) for k in exits]
    count = logits.shape[-1] - 1
    return torch.stack([scores.argsort(dim=-1, descending=True)[:, m % count] for m, scores in enumerate(ranked_by)])
