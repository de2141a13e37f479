"""Which exits an attack climbs. RDI-Nets, ICLR 2020, and its public code:

single       the loss of one exit
average      mean of the losses of all exits
max-average  one single attack an exit; of these, each sample keeps the one with the largest mean loss over all
             exits

The papers' loss is cross-entropy; `losses` has others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mexit.attacks.losses import LOSSES, exit_losses, sample_loss
from mexit.attacks.pgd import PGDConfig, pgd
from mexit.attacks.rng import CounterRNG
from mexit.errors import UsageError
from mexit.models.multi_exit import MultiExit

__all__ = [
    "OBJECTIVES", "Attack", "Autocast", "craft", "craft_each_exit", "exit_losses", "frozen", "keep_worst",
    "start_noise",
]  # fmt: skip

OBJECTIVES = ("single", "average", "max-average")
Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Attack:
    """A whole attack.

    Attributes:
        objective: one of `OBJECTIVES`.
        steps: see `gradient.PGDConfig`.
        exit: the exit that `single` climbs, from 1; None = the last.
        train_mode: craft with the network in train mode (BatchNorm on batch statistics, dropout on), as RDI-Nets'
            code does; the default is eval mode.
        loss: what is climbed at an exit, one of `losses.LOSSES`.
    """

    objective: str
    steps: PGDConfig
    exit: int | None = None
    train_mode: bool = False
    loss: str = "ce"

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UsageError(f"unknown attack '{self.objective}': choose from none, {', '.join(OBJECTIVES)}")
        if self.loss not in LOSSES:
            raise UsageError(f"unknown loss '{self.loss}' of an attack: choose from {', '.join(LOSSES)}")

    def describe(self) -> str:
        """The attack in full, as reports and traces name it."""
        where = f" exit {self.exit or 'last'}" if self.objective == "single" else ""
        loss = "" if self.loss == "ce" else f" on {self.loss}"
        name = f"PGD-{self.steps.count}" if self.steps.count else "noise"
        return f"{name} {self.objective}{where}{loss}, {self.steps.describe()}"


def craft(
    model: MultiExit,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    draw: CounterRNG,
    index: Tensor,
    autocast: Autocast = nullcontext,
    targets: Tensor | None = None,
) -> Tensor:
    """Attack a batch.

    Args:
        model: its parameters are left untouched.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) int64.
        attack: see `Attack`.
        draw, index: randomness of the start, by the samples' places in the data set, (B,).
        autocast: context in which the network runs.
        targets: classes to pull the answers to, (B,) int64; None = away from `labels`.

    Returns:
        Attacked images, (B, C, H, W).
    """
    victim = _Victim(model, images, labels, targets, draw, index, autocast)
    with frozen(model, attack.train_mode):
        if attack.objective != "max-average":
            return _climb(victim, attack)
        candidates = _climb_each_exit(victim, attack)
        return keep_worst(model, candidates, labels, autocast, loss=attack.loss, targets=targets)


def craft_each_exit(
    model: MultiExit,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    draw: CounterRNG,
    index: Tensor,
    autocast: Autocast = nullcontext,
    targets: Tensor | None = None,
) -> Tensor:
    """One single attack an exit, (E, B, C, H, W); the raw material of max-average and of the transfer matrix."""
    with frozen(model, attack.train_mode):
        return _climb_each_exit(_Victim(model, images, labels, targets, draw, index, autocast), attack)


def keep_worst(
    model: MultiExit,
    candidates: Tensor,
    labels: Tensor,
    autocast: Autocast = nullcontext,
    *,
    loss: str = "ce",
    targets: Tensor | None = None,
) -> Tensor:
    """Of candidates (E, B, C, H, W), for each sample the one with the largest mean loss over exits."""
    with torch.no_grad(), autocast():
        losses = torch.stack([sample_loss(loss, model(images), labels, targets) for images in candidates])
    worst = losses.argmax(dim=0)
    return candidates[worst, torch.arange(len(labels), device=labels.device)]


def start_noise(draw: CounterRNG, stream: str, index: Tensor, images: Tensor, steps: PGDConfig) -> Tensor | None:
    """The numbers for the random start or starts that `pgd` expects; None where there is none."""
    if not steps.random_start:
        return None
    shape = images.shape[1:]
    first = draw.uniform(stream, index, shape)
    if steps.restarts == 1:
        return first
    others = [draw.uniform(f"{stream} restart {again}", index, shape) for again in range(1, steps.restarts)]
    return torch.stack([first, *others])


@dataclass(frozen=True)
class _Victim:
    """What is attacked, and the randomness it is attacked with: the arguments of `craft`."""

    model: MultiExit
    images: Tensor
    labels: Tensor
    targets: Tensor | None
    draw: CounterRNG
    index: Tensor
    autocast: Autocast


def _climb_each_exit(victim: _Victim, attack: Attack) -> Tensor:
    singles = [replace(attack, objective="single", exit=k) for k in range(1, victim.model.exits + 1)]
    return torch.stack([_climb(victim, single) for single in singles])


def _climb(victim: _Victim, attack: Attack) -> Tensor:
    model, single = victim.model, attack.objective == "single"

    def loss(attacked: Tensor) -> Tensor:
        with victim.autocast():
            logits = model.forward_exit(attacked, attack.exit or model.exits)[None] if single else model(attacked)
        return sample_loss(attack.loss, logits, victim.labels, victim.targets)

    stream = f"start {attack.objective} {attack.exit or 0}"
    noise = start_noise(victim.draw, stream, victim.index, victim.images, attack.steps)
    return pgd(victim.images, attack.steps, loss, noise)


@contextmanager
def frozen(model: MultiExit, train_mode: bool) -> Iterator[None]:
    """No gradients for parameters, and the mode to craft in; both restored afterwards."""
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
