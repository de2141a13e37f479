"""PGD, and PGD on the exits of a network: gradient ascent on a loss, in a ball around each image and in [0, 1].

A. Madry et al.: Towards deep learning models resistant to adversarial attacks, ICLR 2018. As in the code of RDI-Nets,
the random start is uniform in the ball and the last iterate is returned. The step rules, with g the gradient at x':

sign          step_size * sign(g); in an L2 ball step_size * g / |g|. One step of size eps without a random start is
              FGSM (I. Goodfellow, J. Shlens, C. Szegedy, ICLR 2015)
raw           step_size * g
inverse-clip  clip(1/g, -step_size, step_size): ThunderNNA (arXiv 2111.12305), whose loss is `logit`. It equals
              step_size * sign(g) wherever |g| <= 1/step_size, and moves a pixel of gradient 0 by step_size. The
              authors' code clips neither to [0, 1] nor to a ball; this one does both
penalty       WRM (A. Sinha, H. Namkoong, J. Duchi, ICLR 2018) as in RDI-Nets' code: ascent on
              eps * loss - |x' - x|^2 / 2 with step sizes 1/sqrt(t + 2), t = 0, 1, ... There is no ball; the penalty
              bounds the change, and only [0, 1] is a hard limit. Our reading: the loss is summed over the batch, so
              that the change of a sample does not depend on the batch size

An attack on a multi-exit network (T.-K. Hu et al.: Triple Wins (RDI-Nets), ICLR 2020, and its public code) targets

single       the loss of one exit
average      the mean loss of all exits
max-average  each exit by a single attack; each sample keeps the result with the largest mean loss over all exits

The papers use cross-entropy; `losses` has further losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mexit.attacks.losses import LOSSES, sample_loss
from mexit.attacks.rng import CounterRNG
from mexit.core.pixel_range import format_fraction
from mexit.errors import UsageError
from mexit.models.multi_exit import MultiExit

NORMS = ("linf", "l2")
RULES = ("sign", "raw", "inverse-clip", "penalty")
TARGET_EXITS = ("single", "average", "max-average")
Autocast = Callable[[], AbstractContextManager[object]]
LossFn = Callable[[Tensor], Tensor]  # images (B, C, H, W) to losses (B,)
GradientTransform = Callable[[Tensor, Tensor], Tensor]  # images and gradients to directions, all (B, C, H, W)
RunAttack = Callable[[MultiExit, Tensor, Tensor, "Attack", Tensor | None, Autocast], Tensor]


@dataclass(frozen=True)
class PGDConfig:
    """Parameters of one gradient attack.

    Attributes:
        eps: radius of the ball: for "linf" a fraction of the pixel range, for "l2" the norm of the whole change in
            that unit. For the rule "penalty" the weight of the loss.
        step_size: size of one step, in the unit of eps. Unused by the rule "penalty".
        steps: number of steps.
        random_start: start at a uniform point of the L-infinity ball, or of the L2 sphere as AutoAttack does,
            instead of at the image.
        norm: norm of the ball, one of `NORMS`.
        rule: step rule, one of `RULES`.
        restarts: number of random starts. Of each sample the end point with the largest loss is kept.
    """

    eps: float
    step_size: float
    steps: int
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
        if not (0 < self.eps <= limit and 0 < self.step_size <= limit and self.steps >= 1 and self.eps < math.inf):
            raise UsageError(
                f"an attack needs 0 < eps <= 1, 0 < step <= 1 and at least one step, found eps {self.eps}, "
                f"step {self.step_size}, {self.steps} steps (pixels lie in [0, 1]; write 8/255, not 8; only an L2 "
                "ball may be larger)"
            )
        if self.restarts < 1 or (self.restarts > 1 and not self.random_start):
            raise UsageError(
                f"restarts must be at least 1, and more than one needs a random start; found {self.restarts}"
            )
        if self.rule == "penalty" and self.random_start:
            raise UsageError("the rule 'penalty' has no ball to start in: switch random_start off")

    def describe(self) -> str:
        """Norm, radius, step and start, as reports print them."""
        norm = {"linf": "Linf", "l2": "L2"}[self.norm]
        if self.rule == "penalty":
            return f"L2 penalty, eps {format_fraction(self.eps)}"
        start = "random start" if self.random_start else "no random start"
        start = f"{self.restarts} random starts" if self.restarts > 1 else start
        rule = "" if self.rule == "sign" else f" {self.rule}"
        return f"{norm} eps {format_fraction(self.eps)}, step {format_fraction(self.step_size)}{rule}, {start}"


@dataclass(frozen=True)
class Attack:
    """A PGD attack on a multi-exit network.

    Attributes:
        target_exits: which exits are attacked, one of `TARGET_EXITS`.
        pgd: radius, steps and starts.
        exit: the exit that `single` attacks, from 1; None = the last.
        train_mode: run the network in train mode (BatchNorm on batch statistics, dropout on) as RDI-Nets' code does;
            False = eval mode.
        loss: the loss at each exit, one of `losses.LOSSES`.
    """

    target_exits: str
    pgd: PGDConfig
    exit: int | None = None
    train_mode: bool = False
    loss: str = "ce"

    def __post_init__(self) -> None:
        if self.target_exits not in TARGET_EXITS:
            raise UsageError(f"unknown attack '{self.target_exits}': choose from none, {', '.join(TARGET_EXITS)}")
        if self.loss not in LOSSES:
            raise UsageError(f"unknown loss '{self.loss}' of an attack: choose from {', '.join(LOSSES)}")

    def describe(self) -> str:
        """The attack with all parameters, as reports and traces print it."""
        where = f" exit {self.exit or 'last'}" if self.target_exits == "single" else ""
        loss = "" if self.loss == "ce" else f" on {self.loss}"
        return f"PGD-{self.pgd.steps} {self.target_exits}{where}{loss}, {self.pgd.describe()}"


def craft(
    model: MultiExit,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    rng: CounterRNG,
    index: Tensor,
    autocast: Autocast = nullcontext,
    run: RunAttack | None = None,
) -> Tensor:
    """Attack a batch.

    Args:
        model: the network; its parameters and its mode are unchanged afterwards.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) int64.
        attack: the attack.
        rng: random numbers of the starts.
        index: positions of the samples in the data set, (B,) int64; they select the random numbers.
        autocast: context manager factory in which the network runs.
        run: runs the attack from its random starts; None = `run_attack`.

    Returns:
        Attacked images, (B, C, H, W).
    """
    noise = attack_noise(model.exits, images, attack, rng=rng, index=index)
    return (run or run_attack)(model, images, labels, attack, noise, autocast)


def attack_noise(exits: int, images: Tensor, attack: Attack, *, rng: CounterRNG, index: Tensor) -> Tensor | None:
    """The uniform numbers that `run_attack` expects for its random starts; None without a random start.

    `exits` is E of the attacked network. The others are the arguments of `craft`; of the images only the shape is used.

    Returns:
        (B, C, H, W), with several restarts (restarts, B, C, H, W); for max-average with a first dimension E.
    """
    if attack.target_exits != "max-average":
        return start_noise(rng, f"start {attack.target_exits} {attack.exit or 0}", index, images, attack.pgd)
    if not attack.pgd.random_start:
        return None
    singles = [replace(attack, target_exits="single", exit=k) for k in range(1, exits + 1)]
    parts = [attack_noise(exits, images, single, rng=rng, index=index) for single in singles]
    return torch.stack([part for part in parts if part is not None])


def run_attack(
    model: MultiExit, images: Tensor, labels: Tensor, attack: Attack, noise: Tensor | None, autocast: Autocast
) -> Tensor:
    """Attack a batch from the random starts of `attack_noise`; the other arguments and the result are those of `craft`.

    The function reads nothing but its arguments and the network, so a CUDA graph can hold all of it.
    """
    with frozen(model, attack.train_mode):
        if attack.target_exits != "max-average":
            return _attack_target(model, images, labels, attack, noise, autocast)
        candidates = []
        for k in range(1, model.exits + 1):
            single, start = replace(attack, target_exits="single", exit=k), None if noise is None else noise[k - 1]
            candidates.append(_attack_target(model, images, labels, single, start, autocast))
        return keep_worst(model, torch.stack(candidates), labels, autocast, loss=attack.loss)


def _attack_target(
    model: MultiExit, images: Tensor, labels: Tensor, attack: Attack, noise: Tensor | None, autocast: Autocast
) -> Tensor:
    """PGD on the loss of one exit, or on the mean loss of all exits."""
    single, k = attack.target_exits == "single", attack.exit or model.exits

    def loss_fn(attacked: Tensor) -> Tensor:
        with autocast():
            logits = model.forward_exit(attacked, k)[None] if single else model(attacked)
        return sample_loss(attack.loss, logits, labels)

    return pgd(images, attack.pgd, loss_fn, noise)


def craft_each_exit(
    model: MultiExit,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    rng: CounterRNG,
    index: Tensor,
    autocast: Autocast = nullcontext,
) -> Tensor:
    """One single attack on each exit, (E, B, C, H, W); the arguments are those of `craft`.

    Max-average selects from these images, and they give the transfer matrix between exits.
    """
    singles = [replace(attack, target_exits="single", exit=k) for k in range(1, model.exits + 1)]
    attacked = [craft(model, images, labels, attack, rng=rng, index=index, autocast=autocast) for attack in singles]
    return torch.stack(attacked)


def keep_worst(
    model: MultiExit, candidates: Tensor, labels: Tensor, autocast: Autocast = nullcontext, *, loss: str = "ce"
) -> Tensor:
    """For each sample the candidate with the largest mean loss over exits: (V, B, C, H, W) to (B, C, H, W).

    The network runs in its present mode.
    """
    with torch.no_grad(), autocast():
        losses = torch.stack([sample_loss(loss, model(images), labels) for images in candidates])
    worst = losses.argmax(dim=0)
    return candidates[worst, torch.arange(len(labels), device=labels.device)]


def start_noise(rng: CounterRNG, stream: str, index: Tensor, images: Tensor, config: PGDConfig) -> Tensor | None:
    """The uniform numbers that `pgd` expects for its random starts; None without a random start.

    Args:
        rng: random numbers.
        stream: name of the purpose. Restart r > 0 has the stream "`stream` restart r".
        index: positions of the samples in the data set, (B,) int64.
        images: (B, C, H, W); only the shape is used.
        config: the attack.

    Returns:
        (B, C, H, W), with several restarts (restarts, B, C, H, W).
    """
    if not config.random_start:
        return None
    shape = images.shape[1:]
    first = rng.uniform(stream, index, shape)
    if config.restarts == 1:
        return first
    others = [rng.uniform(f"{stream} restart {restart}", index, shape) for restart in range(1, config.restarts)]
    return torch.stack([first, *others])


def random_noise(images: Tensor, index: Tensor, config: PGDConfig, *, rng: CounterRNG) -> Tensor:
    """Images (B, C, H, W) with random noise of an attack's radius and norm, the baseline that every attack has to beat.

    `index` holds the positions of the samples in the data set, (B,) int64.
    """
    return random_start(images, config, rng.uniform("noise", index, images.shape[1:])).clamp_(0, 1)


@contextmanager
def frozen(model: MultiExit, train_mode: bool) -> Iterator[None]:
    """A context without parameter gradients, in train or eval mode; both are restored afterwards."""
    was_training = model.training
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train(train_mode)
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        model.train(was_training)
        for parameter in trainable:
            parameter.requires_grad_(True)


def pgd(
    images: Tensor,
    config: PGDConfig,
    loss_fn: LossFn,
    noise: Tensor | None,
    transform: GradientTransform | None = None,
) -> Tensor:
    """Maximise `loss_fn`, starting at `images`.

    Args:
        images: (B, C, H, W) in [0, 1].
        config: parameters of the attack.
        loss_fn: images to the loss of each sample, (B,); the sum is maximised. With one restart a scalar is allowed.
        noise: uniform numbers in [0, 1) for the random starts: (B, C, H, W), with several restarts
            (restarts, B, C, H, W). None = no random start.
        transform: maps images and their gradients to the directions that the step rule uses instead of the
            gradients; None = identity.

    Returns:
        Attacked images, detached, in [0, 1] and, unless the rule is "penalty", within eps of `images`.

    Raises:
        UsageError: noise or loss do not fit the number of restarts.
    """
    if config.restarts == 1:
        return _run(images, config, loss_fn, noise, transform)
    if noise is None or noise.ndim != images.ndim + 1 or len(noise) != config.restarts:
        raise UsageError(f"{config.restarts} restarts need noise (restarts, B, C, H, W), one part for each start")
    best, highest = images, torch.full(images.shape[:1], -math.inf, device=images.device)
    for start in noise:
        attacked = _run(images, config, loss_fn, start, transform)
        with torch.no_grad():
            losses = loss_fn(attacked)
        if losses.shape != highest.shape:
            raise UsageError(f"restarts need one loss a sample, {tuple(highest.shape)}, not {tuple(losses.shape)}")
        better = losses > highest
        best = torch.where(better.reshape(-1, *[1] * (images.ndim - 1)), attacked, best)
        highest = torch.where(better, losses, highest)
    return best


def random_start(images: Tensor, config: PGDConfig, noise: Tensor) -> Tensor:
    """A uniform point in the L-infinity ball or on the L2 sphere around each image, not yet clipped to [0, 1].

    Images and noise, uniform numbers in [0, 1), are (B, C, H, W).
    """
    centred = 2 * noise - 1
    if config.norm == "linf":
        return images + centred * config.eps
    normal = torch.erfinv(centred.clamp(-1 + 1e-6, 1 - 1e-6))  # the direction of a normal vector is uniform
    return images + normal * (config.eps / _row_norms(normal))


def _run(
    images: Tensor, config: PGDConfig, loss_fn: LossFn, noise: Tensor | None, transform: GradientTransform | None
) -> Tensor:
    """PGD from one start."""
    attacked = images
    if config.random_start and noise is not None:
        attacked = random_start(images, config, noise)
    project = _projection(images, config)
    for step in range(config.steps):
        attacked = attacked.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_fn(attacked).sum(), attacked)
        attacked = attacked.detach()
        if transform is not None:
            gradient = transform(attacked, gradient)
        attacked = project(attacked + _update(gradient, attacked, images, config, step))
    return attacked.detach()


def _projection(images: Tensor, config: PGDConfig) -> Callable[[Tensor], Tensor]:
    """Projection to the ball, then to [0, 1]. The second cannot leave the ball, since `images` lie in [0, 1]."""
    if config.rule == "penalty":
        return lambda attacked: attacked.clamp_(0, 1)
    if config.norm == "linf":
        low, high = (images - config.eps).clamp_(min=0), (images + config.eps).clamp_(max=1)
        return lambda attacked: attacked.clamp_(low, high)

    def project_l2(attacked: Tensor) -> Tensor:
        change = attacked - images
        return (images + change * (config.eps / _row_norms(change)).clamp(max=1)).clamp_(0, 1)

    return project_l2


def _update(gradient: Tensor, attacked: Tensor, images: Tensor, config: PGDConfig, step: int) -> Tensor:
    """The change of one step by the rule; `step` counts from 0."""
    size = config.step_size
    if config.rule == "penalty":
        return (config.eps * gradient - (attacked - images)) / math.sqrt(step + 2)
    if config.rule == "inverse-clip":
        return gradient.reciprocal().nan_to_num(0, math.inf, -math.inf).clamp_(-size, size)
    if config.rule == "raw":
        return size * gradient
    if config.norm == "l2":
        return gradient * (size / _row_norms(gradient))
    return size * gradient.sign()


def _row_norms(change: Tensor) -> Tensor:
    """The L2 norm of each row, at least 1e-12: (B, C, H, W) to (B, 1, 1, 1)."""
    norms = change.flatten(1).norm(dim=1).clamp_min(1e-12)
    rows: Tensor = norms.reshape(-1, *[1] * (change.ndim - 1))
    return rows
