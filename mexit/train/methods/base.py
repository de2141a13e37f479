"""What every method is: a thin objective on the same loop.

For each batch the loop asks the objective for attacked images (`craft`), runs the network on the clean and on the
attacked ones, lets the objective change itself (`adapt`), and minimises the sum of its `terms`. Most methods
are `terms` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from mexit.attacks.multi_exit_attack import Attack, Autocast, craft, exit_losses
from mexit.attacks.rng import CounterRNG
from mexit.errors import UsageError
from mexit.models.multi_exit import MultiExit
from mexit.train.distributed import SINGLE_PROCESS, ProcessGroup

Sweep = Callable[[bool], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Setup:
    """What an objective may know before the first step.

    Attributes:
        exits, classes: E and C of the network that is trained.
        device: where it lives.
        teachers: frozen networks named by `--teacher`, in eval mode, on the same device.
        autocast: the context for their forward passes.
        model: the network that is trained, for terms on its weights.
        team: the processes among which every batch is shared: what is summed over a batch is summed over them.
    """

    exits: int
    classes: int
    device: str = "cpu"
    teachers: tuple[MultiExit, ...] = ()
    autocast: Autocast = nullcontext
    model: MultiExit | None = None
    team: ProcessGroup = SINGLE_PROCESS


@dataclass(frozen=True)
class Batch:
    """What an objective crafts attacked images from.

    Attributes:
        model: the network that is trained.
        images: (B, C, H, W) in [0, 1].
        labels, index: classes and places in the data set, (B,) int64.
        attack: what to train on; None = clean images only.
        draw: randomness of the epoch.
        autocast: the context for forward passes.
    """

    model: MultiExit
    images: Tensor
    labels: Tensor
    index: Tensor
    attack: Attack | None
    draw: CounterRNG
    autocast: Autocast = nullcontext


@dataclass(frozen=True)
class View:
    """One version of a batch and what the network made of it.

    Attributes:
        name: "clean" or "attacked".
        logits: (E, B, C) float32.
        images: (B, C, H, W).
    """

    name: str
    logits: Tensor
    images: Tensor


@dataclass(frozen=True)
class Outputs:
    """What the loop computed for one batch.

    Attributes:
        labels: (B,) int64.
        index: places in the data set, (B,) int64.
        clean: logits on the images, (E, B, C) float32.
        attacked: logits on the attacked images, (E, B, C) float32; None where the method trains on clean ones.
        draw: randomness of the epoch.
        variants: logits on every attacked version of the images, (V, E, B, C); `attacked` is the first.
        images: (B, C, H, W).
        attacked_images: (V, B, C, H, W), detached.
        smoothing: of the labels, in [0, 1).
        progress: the share of the run that is done, in [0, 1).
        share: of the whole batch that this process's part of it is.
    """

    labels: Tensor
    index: Tensor
    clean: Tensor
    attacked: Tensor | None
    draw: CounterRNG
    variants: Tensor | None = None
    images: Tensor = field(default_factory=lambda: Tensor())
    attacked_images: Tensor | None = None
    smoothing: float = 0.0
    progress: float = 0.0
    share: float = 1.0

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """Mean over samples of the cross-entropy with the (smoothed) labels: (E, B, C) to (E,)."""
        return exit_losses(logits, self.labels, self.smoothing).mean(dim=1)

    def views(self) -> list[View]:
        """The clean images, and the attacked ones where the run has them."""
        views = [View("clean", self.clean, self.images)]
        if self.attacked is not None:
            images = Tensor() if self.attacked_images is None else self.attacked_images[0]
            views.append(View("attacked", self.attacked, images))
        return views

    def need_attacked(self) -> Tensor:
        """`attacked`, or `UsageError` where the run has none."""
        if self.attacked is None:
            raise UsageError("this method trains on attacked images: choose --attack average or max-average")
        return self.attacked


@dataclass(frozen=True)
class Adaptation:
    """What an objective that learns its own weights may use before a step.

    Attributes:
        model: the network; gradients of its parameters may be taken from `Outputs`.
        lr: of the step that follows.
        selection: draws images (B, C, H, W) and labels (B,) of the selection split.
        autocast: the context for forward passes.
    """

    model: MultiExit
    lr: float
    selection: Callable[[], tuple[Tensor, Tensor]]
    autocast: Autocast


class TrainingMethod:
    """A training objective. Subclasses are dataclasses; their fields are what `--set` sets.

    Attributes:
        inputs: what it trains on, for the table of methods.
        default_attack: where none is named: "none" if clean images are enough, else one of `OBJECTIVES`.
        attack_use: "required"; "preferred", which also trains under `--attack none`; "optional" or "never".
        uses_teachers: whether `--teacher` may be given; the networks are then in `Setup.teachers`.
    """

    inputs: ClassVar[str] = "clean and attacked"
    default_attack: ClassVar[str] = "max-average"
    attack_use: ClassVar[str] = "required"
    uses_teachers: ClassVar[bool] = False

    def setup(self, setup: Setup) -> None:
        """Called once, before the first step or before `load`."""

    def begin_epoch(self, epoch: int, epochs: int, sweep: Sweep) -> None:
        """Called before each epoch, from 0.

        `sweep(attacked)` yields logits (E, B, C) and labels (B,) over this process's share of the training split,
        without gradients.
        """

    def craft(self, batch: Batch) -> Tensor | None:
        """Attacked versions of the images, (V, B, C, H, W), or None."""
        if batch.attack is None:
            return None
        attacked = craft(
            batch.model,
            batch.images,
            batch.labels,
            batch.attack,
            draw=batch.draw,
            index=batch.index,
            autocast=batch.autocast,
        )
        return attacked[None]

    def adapt(self, outputs: Outputs, adaptation: Adaptation) -> None:
        """Called before `terms`; for methods that learn weights of their own terms."""

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Named scalars whose sum is minimised."""
        raise NotImplementedError

    def stepped(self, outputs: Outputs) -> None:
        """Called after the optimiser's step."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the weights; kept in the checkpoint."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""

    def report(self) -> dict[str, list[float]]:
        """Extra entries of the epoch's log line, one value an exit."""
        return {}
