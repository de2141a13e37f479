"""Which exits an attack climbs. RDI-Nets, ICLR 2020, and its public code:

single       cross-entropy of one exit
average      mean of the cross-entropies of all exits
max-average  one single attack an exit; of these, each sample keeps the one with the largest mean
             cross-entropy over all exits
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mexit.errors import UsageError
from mexit.train.attacks.gradient import Steps, ascend
from mexit.train.models.multi_exit import MultiExit
from mexit.train.randomness import Draw

OBJECTIVES = ("single", "average", "max-average")
Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Attack:
    """A whole attack.

    Attributes:
        objective: one of `OBJECTIVES`.
        steps: see `gradient.Steps`.
        exit: the exit that `single` climbs, from 1; None = the last.
        train_mode: craft with the network in train mode (BatchNorm on batch statistics, dropout on), as RDI-Nets'
            code does; the default is eval mode.
    """

    objective: str
    steps: Steps
    exit: int | None = None
    train_mode: bool = False

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UsageError(f"unknown attack '{self.objective}': choose from none, {', '.join(OBJECTIVES)}")

    def describe(self) -> str:
        """The attack in full, as reports and traces name it."""
        where = f" exit {self.exit or 'last'}" if self.objective == "single" else ""
        start = "random start" if self.steps.random_start else "no random start"
        return (
            f"PGD-{self.steps.count} {self.objective}{where}, Linf eps {self.steps.eps:.6g}, "
            f"step {self.steps.size:.6g}, {start}"
        )


def craft(
    model: MultiExit,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    draw: Draw,
    index: Tensor,
    autocast: Autocast = nullcontext,
) -> Tensor:
    """Attack a batch.

    Args:
        model: its parameters are left untouched.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) int64.
        attack: see `Attack`.
        draw, index: randomness of the start, by the samples' places in the data set, (B,).
        autocast: context in which the network runs.

    Returns:
        Attacked images, (B, C, H, W).
    """
    with _frozen(model, attack.train_mode):
        if attack.objective != "max-average":
            return _climb(model, images, labels, attack, attack.exit, draw, index, autocast)
        single = Attack("single", attack.steps, None, attack.train_mode)
        candidates = craft_each_exit(model, images, labels, single, draw=draw, index=index, autocast=autocast)
        return keep_worst(model, candidates, labels, autocast)


def craft_each_exit(
    model: MultiExit,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    draw: Draw,
    index: Tensor,
    autocast: Autocast = nullcontext,
) -> Tensor:
    """One single attack an exit, (E, B, C, H, W); the raw material of max-average and of the transfer matrix."""
    with _frozen(model, attack.train_mode):
        return torch.stack(
            [
                _climb(model, images, labels, Attack("single", attack.steps, k), k, draw, index, autocast)
                for k in range(1, model.exits + 1)
            ]
        )


def keep_worst(model: MultiExit, candidates: Tensor, labels: Tensor, autocast: Autocast = nullcontext) -> Tensor:
    """Of candidates (E, B, C, H, W), for each sample the one with the largest mean cross-entropy over exits."""
    with torch.no_grad(), autocast():
        losses = torch.stack([exit_losses(model(images), labels).mean(dim=0) for images in candidates])
    worst = losses.argmax(dim=0)
    return candidates[worst, torch.arange(len(labels), device=labels.device)]


def exit_losses(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of every exit and sample: logits (E, B, C), labels (B,) to (E, B) float32.

    `smoothing` in [0, 1) spreads that share of the label over all classes.
    """
    exits, rows, classes = logits.shape
    flat = F.cross_entropy(
        logits.float().reshape(-1, classes), labels.repeat(exits), reduction="none", label_smoothing=smoothing
    )
    return flat.reshape(exits, rows)


def _climb(
    model: MultiExit,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    k: int | None,
    draw: Draw,
    index: Tensor,
    autocast: Autocast,
) -> Tensor:
    single = attack.objective == "single"

    def loss(attacked: Tensor) -> Tensor:
        with autocast():
            logits = model.one_exit(attacked, k or model.exits)[None] if single else model(attacked)
        return exit_losses(logits, labels).mean(dim=0).sum()

    stream = f"start {attack.objective} {k or 0}"
    noise = draw.uniform(stream, index, images.shape[1:]) if attack.steps.random_start else None
    return ascend(images, attack.steps, loss, noise)


@contextmanager
def _frozen(model: MultiExit, train_mode: bool) -> Iterator[None]:
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
