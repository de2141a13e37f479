"""Attacks on a multi-exit network: PGD on the loss of one exit or of all exits.

T.-K. Hu, T. Chen, H. Wang, Z. Wang: Triple Wins (RDI-Nets), ICLR 2020, and its public code. An attack targets

single       the loss of one exit
average      the mean loss of all exits
max-average  each exit by a single attack; each sample keeps the result with the largest mean loss over all exits

The papers use cross-entropy; `losses` has further losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mexit.attacks.losses import LOSSES, sample_loss
from mexit.attacks.pgd import PGDConfig, pgd, random_start
from mexit.attacks.rng import CounterRNG
from mexit.errors import UsageError
from mexit.models.multi_exit import MultiExit

TARGET_EXITS = ("single", "average", "max-average")
Autocast = Callable[[], AbstractContextManager[object]]


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
    targets: Tensor | None = None,
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
        targets: target classes, (B,) int64; None = untargeted.

    Returns:
        Attacked images, (B, C, H, W).
    """
    if attack.target_exits == "max-average":
        candidates = craft_each_exit(
            model, images, labels, attack, rng=rng, index=index, autocast=autocast, targets=targets
        )
        with frozen(model, attack.train_mode):
            return keep_worst(model, candidates, labels, autocast, loss=attack.loss, targets=targets)
    single, k = attack.target_exits == "single", attack.exit or model.exits

    def loss_fn(attacked: Tensor) -> Tensor:
        with autocast():
            logits = model.forward_exit(attacked, k)[None] if single else model(attacked)
        return sample_loss(attack.loss, logits, labels, targets)

    noise = start_noise(rng, f"start {attack.target_exits} {attack.exit or 0}", index, images, attack.pgd)
    with frozen(model, attack.train_mode):
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
    targets: Tensor | None = None,
) -> Tensor:
    """One single attack on each exit, (E, B, C, H, W); the arguments are those of `craft`.

    Max-average selects from these images, and they give the transfer matrix between exits.
    """
    singles = [replace(attack, target_exits="single", exit=k) for k in range(1, model.exits + 1)]
    return torch.stack(
        [
            craft(model, images, labels, single, rng=rng, index=index, autocast=autocast, targets=targets)
            for single in singles
        ]
    )


def keep_worst(
    model: MultiExit,
    candidates: Tensor,
    labels: Tensor,
    autocast: Autocast = nullcontext,
    *,
    loss: str = "ce",
    targets: Tensor | None = None,
) -> Tensor:
    """For each sample the candidate with the largest mean loss over exits.

    Args:
        model: the network, run in its present mode.
        candidates: (V, B, C, H, W).
        labels, autocast, targets: see `craft`.
        loss: one of `losses.LOSSES`.

    Returns:
        (B, C, H, W).
    """
    with torch.no_grad(), autocast():
        losses = torch.stack([sample_loss(loss, model(images), labels, targets) for images in candidates])
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
    """Images with random noise as large as an attack, the baseline that every attack has to beat.

    Args:
        images: (B, C, H, W) in [0, 1].
        index: positions of the samples in the data set, (B,) int64.
        config: radius and norm of the attack.
        rng: random numbers.

    Returns:
        (B, C, H, W) in [0, 1].
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
