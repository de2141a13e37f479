"""THE gradient loop: steps uphill, projected into a ball around the image and into [0, 1].

A. Madry et al.: Towards deep learning models resistant to adversarial attacks, ICLR 2018. As in RDI-Nets' code,
the random start is uniform in the ball and the last iterate is returned. What a step is (`PGDConfig.rule`), with g
the gradient at x':

sign          size * sign(g); in an L2 ball size * g / |g|
raw           size * g
inverse-clip  clip(1/g, -size, size): ThunderNNA. It equals size * sign(g) wherever |g| <= 1/size; where the
              gradient is 0 it moves by size all the same
penalty       RDI-Nets' WRM: ascent on eps * loss - |x' - x|^2 / 2 with steps 1/sqrt(t + 2), t = 0, 1, ... This
              rule has no ball, the square is all that holds it back; only [0, 1] is a hard limit. That the loss
              is summed over rows, so that samples do not weaken each other, is our reading
none          no gradient: the random start is the attack
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mexit.errors import UsageError

NORMS = ("linf", "l2")
RULES = ("sign", "raw", "inverse-clip", "penalty", "none")
LossFn = Callable[[Tensor], Tensor]
GradientTransform = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PGDConfig:
    """How far and how often.

    Attributes:
        eps: radius of the ball: for "linf" a fraction of the pixel range [0, 1], for "l2" the length of the whole
            change in that unit; for the rule "penalty" the weight of the loss.
        size: of one step, likewise; the rules "penalty" and "none" do not use it.
        count: how many; 0 only with the rule "none".
        random_start: begin at a uniform point of the L-infinity ball, or of the L2 sphere as AutoAttack does,
            instead of the image.
        norm: of the ball, one of `NORMS`.
        rule: what a step is, one of `RULES`.
        restarts: random starts; each sample keeps the one that ended with the largest loss.
    """

    eps: float
    size: float
    count: int
    random_start: bool = True
    norm: str = "linf"
    rule: str = "sign"
    restarts: int = 1

    def __post_init__(self) -> None:
        if self.norm not in NORMS or self.rule not in RULES:
            raise UsageError(
                f"the norm of an attack is one of {', '.join(NORMS)} and its rule one of {', '.join(RULES)}; "
                f"found {self.norm} and {self.rule}"
            )
        limit = 1.0 if self.norm == "linf" and self.rule != "penalty" else math.inf
        enough = self.count == 0 if self.rule == "none" else self.count >= 1
        if not (0 < self.eps <= limit and 0 < self.size <= limit and enough and self.eps < math.inf):
            raise UsageError(
                f"an attack needs 0 < eps <= 1, 0 < step <= 1 and at least one step, found eps {self.eps}, "
                f"step {self.size}, {self.count} steps (pixels lie in [0, 1]; write 8/255, not 8; only an L2 ball "
                "may be larger, and only random noise takes no step)"
            )
        if self.restarts < 1 or (self.restarts > 1 and not self.random_start):
            raise UsageError(f"restarts must be at least 1, and more need a random start; found {self.restarts}")
        if self.random_start != {"penalty": False, "none": True}.get(self.rule, self.random_start):
            raise UsageError(
                "the penalty rule has no ball to start in (random_start must be off), and noise is nothing but a "
                "random start (it must be on)"
            )

    def describe(self) -> str:
        """Norm, radius, step and start, as reports name them."""
        norm = {"linf": "Linf", "l2": "L2"}[self.norm]
        if self.rule == "penalty":
            return f"L2 penalty, eps {self.eps:.6g}"
        if self.rule == "none":
            return f"{norm} eps {self.eps:.6g}"
        start = "random start" if self.random_start else "no random start"
        start = f"{self.restarts} random starts" if self.restarts > 1 else start
        rule = "" if self.rule == "sign" else f" {self.rule}"
        return f"{norm} eps {self.eps:.6g}, step {self.size:.6g}{rule}, {start}"


def fgsm(eps: float, norm: str = "linf") -> PGDConfig:
    """One step of size eps from the image (I. Goodfellow, J. Shlens, C. Szegedy, ICLR 2015)."""
    return PGDConfig(eps, eps, 1, random_start=False, norm=norm)


def noise(eps: float, norm: str = "linf") -> PGDConfig:
    """Random noise: the baseline that every attack has to beat."""
    return PGDConfig(eps, eps, 0, norm=norm, rule="none")


def thunder(eps: float) -> PGDConfig:
    """ThunderNNA (arXiv 2111.12305): one inverse-clip step of size eps; its loss is "logit".

    Its authors' code clips neither to [0, 1] nor to a ball; this one does.
    """
    return PGDConfig(eps, eps, 1, random_start=False, rule="inverse-clip")


def wrm(eps: float, count: int) -> PGDConfig:
    """The Lagrangian attack (A. Sinha, H. Namkoong, J. Duchi, ICLR 2018) as RDI-Nets' code has it."""
    return PGDConfig(eps, 1.0, count, random_start=False, rule="penalty")


def pgd(
    images: Tensor, steps: PGDConfig, loss: LossFn, noise: Tensor | None, turn: GradientTransform | None = None
) -> Tensor:
    """Climb `loss` from `images`.

    Args:
        images: (B, C, H, W) in [0, 1].
        steps: see `PGDConfig`.
        loss: of a batch like `images`, per sample, (B,), and summed here; without restarts a scalar will do.
        noise: uniform numbers in [0, 1) like `images` for the random start, with restarts (restarts, B, C, H, W);
            None if there is none.
        turn: from a batch and its gradient to what the rule uses instead of the gradient; None leaves it.

    Returns:
        Attacked images, detached, in [0, 1] and, unless the rule is "penalty", within eps of `images`.
    """
    if steps.restarts == 1:
        return _climb(images, steps, loss, noise, turn)
    if noise is None or noise.ndim != images.ndim + 1 or len(noise) != steps.restarts:
        raise UsageError(f"{steps.restarts} restarts need noise (restarts, B, C, H, W) for as many random starts")
    best, highest = images, torch.full(images.shape[:1], -math.inf, device=images.device)
    for start in noise:
        attacked = _climb(images, steps, loss, start, turn)
        with torch.no_grad():
            reached = loss(attacked)
        if reached.shape != highest.shape:
            raise UsageError(
                f"restarts need one loss a sample, {tuple(highest.shape)}, not {tuple(reached.shape)}"
            )
        better = reached > highest
        best = torch.where(better.reshape(-1, *[1] * (images.ndim - 1)), attacked, best)
        highest = torch.where(better, reached, highest)
    return best


def _climb(
    images: Tensor, steps: PGDConfig, loss: LossFn, noise: Tensor | None, turn: GradientTransform | None
) -> Tensor:
    attacked = images
    if steps.random_start and noise is not None:
        attacked = images + _start(noise, steps)
    project = _projection(images, steps)
    if steps.count == 0:
        return project(attacked)
    for number in range(steps.count):
        attacked = attacked.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(attacked).sum(), attacked)
        attacked = attacked.detach()
        if turn is not None:
            gradient = turn(attacked, gradient)
        attacked = project(attacked + _move(gradient, attacked, images, steps, number))
    return attacked.detach()


def _start(noise: Tensor, steps: PGDConfig) -> Tensor:
    """From uniform numbers in [0, 1) to a change of the image: in the L-infinity ball, or on the L2 sphere."""
    centred = 2 * noise - 1
    if steps.norm == "linf":
        return centred * steps.eps
    normal = torch.erfinv(centred.clamp(-1 + 1e-6, 1 - 1e-6))  # a normal direction is uniform
    return normal * (steps.eps / _length(normal))


def _projection(images: Tensor, steps: PGDConfig) -> Callable[[Tensor], Tensor]:
    """Into the ball, then into [0, 1]; the second cannot leave the ball, since `images` lie in [0, 1]."""
    if steps.rule == "penalty":
        return lambda attacked: attacked.clamp_(0, 1)
    if steps.norm == "linf":
        low, high = (images - steps.eps).clamp_(min=0), (images + steps.eps).clamp_(max=1)
        return lambda attacked: attacked.clamp_(low, high)

    def into_l2_ball(attacked: Tensor) -> Tensor:
        change = attacked - images
        return (images + change * (steps.eps / _length(change)).clamp(max=1)).clamp_(0, 1)

    return into_l2_ball


def _move(gradient: Tensor, attacked: Tensor, images: Tensor, steps: PGDConfig, number: int) -> Tensor:
    """One step of the rule."""
    if steps.rule == "penalty":
        return (steps.eps * gradient - (attacked - images)) / math.sqrt(number + 2)
    if steps.rule == "inverse-clip":
        return gradient.reciprocal().nan_to_num(0, math.inf, -math.inf).clamp_(-steps.size, steps.size)
    if steps.rule == "raw":
        return steps.size * gradient
    if steps.norm == "l2":
        return gradient * (steps.size / _length(gradient))
    return steps.size * gradient.sign()


def _length(change: Tensor) -> Tensor:
    """The L2 norm of each row, never 0: (B, C, H, W) to (B, 1, 1, 1)."""
    length = change.flatten(1).norm(dim=1).clamp_min(1e-12)
    rows: Tensor = length.reshape(-1, *[1] * (change.ndim - 1))
    return rows
