"""The interface of a training method, and the data that the training loop passes to it.

For each batch the loop asks the method for attacked images (`craft`), runs the network on the clean and the attacked
images, lets the method update its own weights (`adapt`), minimises the sum of its `terms`, and calls `after_step`.
Most methods implement `terms` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from mexit.attacks.losses import exit_cross_entropy
from mexit.attacks.pgd import Attack, Autocast, RunAttack, craft, run_attack
from mexit.attacks.rng import CounterRNG
from mexit.errors import UsageError
from mexit.models.multi_exit import MultiExit
from mexit.train.distributed import SINGLE_PROCESS, ProcessGroup

TrainLogits = Callable[[bool], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Setup:
    """The run that a method is part of.

    Attributes:
        exits, classes: E and C of the trained network.
        device: the torch device of its tensors.
        teachers: the networks named by `--teacher`: frozen, in eval mode, on `device`.
        autocast: the context for forward passes.
        model: the trained network, for terms on its weights and for attacks of the method's own.
        process_group: the processes that share every batch; sums over a batch are sums over these processes.
        data_set: the data set as named after `--data`, for published settings that depend on it.
    """

    exits: int
    classes: int
    device: str = "cpu"
    teachers: tuple[MultiExit, ...] = ()
    autocast: Autocast = nullcontext
    model: MultiExit | None = None
    process_group: ProcessGroup = SINGLE_PROCESS
    data_set: str = ""


@dataclass(frozen=True)
class Batch:
    """This process's part of a batch, before the forward pass.

    Attributes:
        model: the network to attack.
        images: (B, C, H, W) float32 in [0, 1].
        labels: classes, (B,) int64.
        index: positions in the data set, (B,) int64.
        attack: the training attack; None = clean images only.
        rng: random numbers of the epoch.
        autocast: the context for forward passes.
        run_attack: runs an attack from its random starts, see `attacks.pgd.run_attack`.
    """

    model: MultiExit
    images: Tensor
    labels: Tensor
    index: Tensor
    attack: Attack | None
    rng: CounterRNG
    autocast: Autocast = nullcontext
    run_attack: RunAttack = run_attack


@dataclass(frozen=True)
class StepInfo:
    """The position of one step in the run.

    Attributes:
        number: of the step in the run, from 0; the same in every process.
        progress: fraction of the run that is done, in [0, 1).
        share: fraction of the whole batch that this process has, in (0, 1].
        label_smoothing: in [0, 1).
        exit_weights: weight of each exit in the cross-entropies, (E,) float32 on the device; None = 1 each.
    """

    number: int = 0
    progress: float = 0.0
    share: float = 1.0
    label_smoothing: float = 0.0
    exit_weights: Tensor | None = None


@dataclass(frozen=True)
class View:
    """One version of the images of a batch, and the network's logits on it.

    Attributes:
        name: "clean" or "attacked".
        images: (B, C, H, W).
        logits: (E, B, C) float32.
    """

    name: str
    images: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Outputs:
    """The network's logits on one batch.

    Attributes:
        batch: images, labels and random numbers.
        clean: logits on the clean images, (E, B, C) float32.
        variants: logits on every attacked version of the images, (V, E, B, C) float32; None without an attack.
        attacked_images: those versions, (V, B, C, H, W), detached; None without an attack.
        step: the position of the step in the run.
    """

    batch: Batch
    clean: Tensor
    variants: Tensor | None = None
    attacked_images: Tensor | None = None
    step: StepInfo = StepInfo()

    @property
    def labels(self) -> Tensor:
        """Classes, (B,) int64."""
        return self.batch.labels

    @property
    def attacked(self) -> Tensor | None:
        """Logits on the first attacked version, (E, B, C); None without an attack."""
        return None if self.variants is None else self.variants[0]

    def require_variants(self) -> Tensor:
        """Logits on every attacked version, (V, E, B, C). Raises `UsageError` in a run without an attack."""
        if self.variants is None:
            raise UsageError("this method trains on attacked images: choose --attack average or max-average")
        return self.variants

    def require_attacked(self) -> Tensor:
        """Logits on the first attacked version, (E, B, C). Raises `UsageError` in a run without an attack."""
        return self.require_variants()[0]

    def views(self) -> list[View]:
        """The clean images, and in a run with an attack the first attacked version."""
        views = [View("clean", self.batch.images, self.clean)]
        if self.variants is not None:
            assert self.attacked_images is not None
            views.append(View("attacked", self.attacked_images[0], self.variants[0]))
        return views

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """Mean over samples of the weighted cross-entropy with the (smoothed) labels: (E, B, C) to (E,)."""
        losses = exit_cross_entropy(logits, self.labels, self.step.label_smoothing).mean(dim=1)
        return self.weight_exits(losses)

    def weight_exits(self, losses: Tensor) -> Tensor:
        """Losses of the first K exits, (K,), times the run's weights of the exits."""
        return losses if self.step.exit_weights is None else losses * self.step.exit_weights[: len(losses)]


@dataclass(frozen=True)
class Adaptation:
    """What a method that learns weights of its own terms may use before a step.

    Attributes:
        model: the trained network; `Outputs` holds graphs to its parameters.
        lr: the learning rate of the step that follows.
        selection: returns images (B, C, H, W) and labels (B,) drawn from the selection split.
        autocast: the context for forward passes.
    """

    model: MultiExit
    lr: float
    selection: Callable[[], tuple[Tensor, Tensor]]
    autocast: Autocast


@dataclass
class TrainingMethod:
    """Base class of the methods. Subclasses are dataclasses; their fields are the options of `--set`.

    Attributes:
        inputs: the images it trains on, for the table of methods.
        default_attack: the attack where none is named: "none", or one of `attacks.pgd.TARGET_EXITS`.
        attack_use: "required"; "preferred" (attacked by default, `--attack none` is allowed); "optional" (clean by
            default); or "never".
        differentiates_gradients: whether it differentiates gradients of the network, which CUDA graphs cannot do.
        uses_teachers: whether `--teacher` is allowed; the networks are then in `run.teachers`.
        run: what `setup` was called with.
    """

    inputs: ClassVar[str] = "clean and attacked"
    default_attack: ClassVar[str] = "max-average"
    attack_use: ClassVar[str] = "required"
    uses_teachers: ClassVar[bool] = False
    differentiates_gradients: ClassVar[bool] = False
    run: Setup = field(init=False, repr=False, compare=False)

    def setup(self, run: Setup) -> None:
        """Prepare for a run; called once, before the first step and before `load_state_dict`."""
        self.run = run

    def begin_epoch(self, epoch: int, epochs: int, train_logits: TrainLogits) -> None:
        """Prepare for an epoch.

        Args:
            epoch: from 0.
            epochs: of the whole run.
            train_logits: with True for attacked and False for clean images, yields logits (E, B, C) and labels (B,)
                over this process's part of the training split, without gradients.
        """

    def craft(self, batch: Batch) -> Tensor | None:
        """Attacked versions of the images, (V, B, C, H, W), detached; None without an attack."""
        if batch.attack is None:
            return None
        return craft(
            batch.model, batch.images, batch.labels, batch.attack,
            rng=batch.rng, index=batch.index, autocast=batch.autocast, run=batch.run_attack,
        )[None]  # fmt: skip

    def adapt(self, outputs: Outputs, adaptation: Adaptation) -> None:
        """Update weights of the method's own terms; called before `terms`."""

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Named scalars whose sum is minimised. May be called more than once a step; changes nothing."""
        raise NotImplementedError

    def after_step(self, outputs: Outputs) -> None:
        """Update the method's state after the optimiser's step."""

    def state_dict(self) -> dict[str, Tensor]:
        """The state that a resumed run needs besides the network's weights; kept in the checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""

    def report(self) -> dict[str, list[float]]:
        """Further entries of the epoch's log line, one value per exit."""
        return {}
