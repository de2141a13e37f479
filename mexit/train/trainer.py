"""The training loop: batches, steps, checkpoints, validation and the log; the same for every training method.

Every random number is a function of (seed, epoch, sample), so a resumed run ends with the same weights as an
uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mexit.attacks.pgd import Attack
from mexit.attacks.rng import CounterRNG
from mexit.data.dataset import DataSet, split_batches
from mexit.data.splits import Splits
from mexit.errors import MexitError
from mexit.models import build_model, model_spec
from mexit.train import checkpoint
from mexit.train.augment import augment
from mexit.train.checkpoint import START, Position, TrainState
from mexit.train.config import TrainSettings
from mexit.train.dataloader import load_batches
from mexit.train.distributed import SINGLE_PROCESS, ProcessGroup
from mexit.train.methods import build_method
from mexit.train.methods.base import Adaptation, Batch, Setup, StepInfo
from mexit.train.precision import Precision
from mexit.train.regularizers import EMA
from mexit.train.teachers import load_teachers
from mexit.train.train_step import TrainStep
from mexit.train.validation import attacked_batches, correct_predictions, exit_logits

CHECKPOINT_INTERVAL_S = 60.0
INFERENCE_BATCH = 256


@dataclass(frozen=True)
class StepReport:
    """The metrics after a step.

    Attributes:
        epoch: current epoch, from 1.
        epochs: epochs of the run.
        samples: samples processed in all epochs.
        total_samples: samples of the whole run.
        loss: mean loss of the epoch so far.
        attacked_accuracy: accuracy on the attacked training batches of the epoch so far, mean over exits; None
            without an attack.
        epoch_record: the log record, after the last step of an epoch; None otherwise.
    """

    epoch: int
    epochs: int
    samples: int
    total_samples: int
    loss: float
    attacked_accuracy: float | None
    epoch_record: dict[str, Any] | None = None


@dataclass
class Trainer:
    """Trains one run.

    Attributes:
        run: run directory.
        settings: settings that determine the weights.
        data: data set.
        splits: training and selection samples.
        precision: device and arithmetic.
        workers: loader threads, see `dataloader.load_batches`.
        process_group: processes that train together; the main one validates, writes and reports.
        position: position in the schedule.
        kept: the weights that would be the result if training ended at `position`.
    """

    run: Path
    settings: TrainSettings
    data: DataSet
    splits: Splits
    precision: Precision
    workers: int = 0
    process_group: ProcessGroup = SINGLE_PROCESS
    position: Position = field(default=START, init=False)
    kept: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        settings, precision = self.settings, self.precision
        torch.manual_seed(settings.seed)
        self.model = precision.prepare(build_model(settings.model, len(self.data.classes)))
        self.input = model_spec(settings.model).input
        self.attack = settings.training_attack()
        self.optimiser = torch.optim.SGD(
            self.model.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay
        )
        self.ema = EMA(settings.ema) if settings.ema else None
        self.method = build_method(settings.method, settings.options)
        teachers = load_teachers(settings, self.data.classes, precision)
        self.method.setup(
            Setup(
                self.model.exits,
                self.model.classes,
                precision.device,
                teachers,
                precision.autocast,
                self.model,
                self.process_group,
                settings.data,
            )
        )
        copy = precision.attack_copy(self.model)
        self.train_step = TrainStep(
            self.model, self.method, self.optimiser, settings, self.ema, copy, self.process_group
        )
        self.train_index = self.splits.part("train")
        self.process_group.check_batch(settings.batch, len(self.train_index))
        self.steps_per_epoch = -(-len(self.train_index) // settings.batch)

    def resume(self) -> None:
        """Restore the state of the checkpoint. Raises `NotFound` or `Damaged`, see `checkpoint.restore`."""
        state = checkpoint.restore(self.run, self.model, self.optimiser)
        self.position, self.kept = state.position, dict(state.kept)
        if state.method:
            self.method.load_state_dict(state.method)
        if self.ema is not None:
            self.ema.weights = dict(state.average)

    def train(
        self,
        on_step: Callable[[StepReport], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train from the current position to the end.

        Args:
            on_step: called after every step and after every epoch.
            should_stop: called after every step; True writes a checkpoint and ends training.

        Returns:
            Whether the run is finished.

        Raises:
            MexitError: the loss is not finite, or a write failed; the last checkpoint is intact.
        """
        if self.process_group.is_main:
            _truncate_log(self.run / checkpoint.LOG, self.position.log)
        saved_s = time.monotonic()
        while self.position.epoch < self.settings.epochs:
            for sums in self._remaining_steps():
                self.position = replace(self.position, step=self.position.step + 1, sums=sums)
                on_step(self._report())
                stop = self.process_group.any(should_stop())
                if stop or time.monotonic() - saved_s > CHECKPOINT_INTERVAL_S:
                    self._save_checkpoint()
                    saved_s = time.monotonic()
                if stop:
                    return False
            if self.process_group.is_main:
                on_step(self._end_epoch())
            else:
                self.position = replace(START, epoch=self.position.epoch + 1)
            saved_s = time.monotonic()
        if self.process_group.is_main:
            checkpoint.save_weights(self.run, self.kept, self.settings, len(self.data.classes))
        return self.process_group.broadcast(True)  # the other processes wait until the weights are written

    def _remaining_steps(self) -> Iterator[dict[str, float]]:
        """Run the remaining steps of the epoch; yield the sums of `Position` after each."""
        rng = CounterRNG(self.settings.seed, self.position.epoch)
        order = self.train_index[rng.permutation(len(self.train_index))]
        sums = dict(self.position.sums)
        if self.position.step == 0:
            self.method.begin_epoch(self.position.epoch, self.settings.epochs, self._iterate_train_logits)
        first, size = self.position.step, self.settings.batch
        batches = [order[step * size : (step + 1) * size] for step in range(first, self.steps_per_epoch)]
        shards = [batch[self.process_group.shard(len(batch))] for batch in batches]
        with closing(self._load(shards, rng)) as loaded:
            for step, batch in enumerate(loaded, start=first):
                count = len(batches[step - first])
                for name, value in self._run_step(batch, step, len(batch.labels) / count).items():
                    sums[name] = sums.get(name, 0.0) + value * count
                sums["n"] = sums.get("n", 0.0) + count
                yield dict(sums)

    def _run_step(self, batch: Batch, step: int, share: float) -> dict[str, float]:
        lr = self._lr(step)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        batch.rng.seed_layers(step * self.process_group.size + self.process_group.rank)
        adaptation = Adaptation(self.model, lr, lambda: self._selection_batch(batch.rng, step), self.precision.autocast)
        number = self.position.epoch * self.steps_per_epoch + step
        progress = number / (self.steps_per_epoch * self.settings.epochs)
        info = StepInfo(number, progress, share, self.settings.label_smoothing)
        metrics = self.train_step.run(batch, adaptation, info)
        if not math.isfinite(metrics["loss"]):
            raise MexitError(
                f"the loss became {metrics['loss']} in epoch {self.position.epoch + 1}, step {step + 1}: "
                f"lower --lr (it was {self.settings.lr}); the last checkpoint in {self.run} is intact"
            )
        return metrics

    def _load(self, shards: Sequence[NDArray[np.int64]], rng: CounterRNG) -> Generator[Batch, None, None]:
        """Load, augment and move batches to the device."""
        device = self.precision.device
        with closing(load_batches(self.data, shards, self.input, self.workers)) as loaded:
            for shard, pixels in zip(shards, loaded, strict=True):
                index = torch.from_numpy(shard)
                images = augment(torch.from_numpy(pixels), self.settings.augment, rng, index)
                labels = torch.from_numpy(self.data.labels[shard]).to(device)
                yield Batch(
                    self.model,
                    self.precision.to_device(images),
                    labels,
                    index.to(device),
                    self.attack,
                    rng,
                    self.precision.autocast,
                )

    def _selection_batch(self, rng: CounterRNG, step: int) -> tuple[Tensor, Tensor]:
        """Images and labels of a random batch of the selection split, a different one at every step."""
        index = self.splits.part("selection")
        chosen = index[rng.choice(len(index), self.settings.batch, step)]
        images = self.precision.to_device(torch.from_numpy(self.data.batch(chosen, self.input)))
        return images, torch.from_numpy(self.data.labels[chosen]).to(self.precision.device)

    def _iterate_train_logits(self, attacked: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (E, B, C) and labels (B,) of this process's training images, in train mode, without gradients."""
        rng = CounterRNG(self.settings.seed, self.position.epoch)
        rng.seed_layers(-1)  # torch's generator is in another state in a resumed run
        shard = self.train_index[self.process_group.shard(len(self.train_index))]
        batches = split_batches(shard, INFERENCE_BATCH)
        with closing(self._load(batches, rng)) as loaded:
            for batch in loaded:
                variants = self.train_step.craft(batch) if attacked else None
                self.model.train()
                with torch.no_grad(), self.precision.autocast():
                    yield self.model(batch.images if variants is None else variants[0]).float(), batch.labels

    def _lr(self, step: int) -> float:
        """The learning rate of a step of the current epoch."""
        return self.settings.lr_at((self.position.epoch + step / self.steps_per_epoch) / self.settings.epochs)

    def _end_epoch(self) -> StepReport:
        """Validate, update the weights to keep, write the log record and the checkpoint."""
        position = self.position
        record: dict[str, Any] = {"epoch": position.epoch + 1}
        record |= {name: round(value / position.sums["n"], 6) for name, value in position.sums.items() if name != "n"}
        record["lr"] = self._lr(self.steps_per_epoch - 1)
        record |= self.method.report()
        record["selection"] = self._validate()
        score = float(np.mean(record["selection"]["attacked" if self.attack else "clean"]))
        best = position.best
        if self.settings.keep == "last" or best is None or score > best:
            best = score
            self.kept = {name: value.detach().clone() for name, value in self._result_weights().items()}
        report = self._report(record)
        log_bytes = _append_log(self.run / checkpoint.LOG, record)
        self.position = Position(position.epoch + 1, 0, {}, best, log_bytes)
        self._save_checkpoint()
        return report

    def _validate(self) -> dict[str, list[float]]:
        """Accuracy of every exit on the selection split, clean and under a short average attack, in float32."""
        index = self.splits.part("selection")
        labels = self.data.labels[index]
        model = build_model(self.settings.model, len(self.data.classes)).to(self.precision.device)
        model.load_state_dict(self._result_weights())
        conditions: dict[str, Attack | None] = {"clean": None}
        if self.attack is not None:
            conditions["attacked"] = self.settings.test_attack("average", steps=self.settings.selection_steps)
        accuracy = {}
        for name, attack in conditions.items():
            batches = attacked_batches(model, self.data, index, self.input, attack, seed=self.settings.seed)
            correct = correct_predictions(exit_logits(model, batches), labels)
            accuracy[name] = correct.mean(axis=1).round(6).tolist()
        return accuracy

    def _result_weights(self) -> Mapping[str, Tensor]:
        """The averaged weights where there is an average, else the weights of the network."""
        weights: Mapping[str, Tensor] = self.model.state_dict()
        return weights if self.ema is None else self.ema.weights

    def _save_checkpoint(self) -> None:
        if not self.process_group.is_main:
            return
        average = {} if self.ema is None else self.ema.weights
        state = TrainState(self.position, self.kept, self.method.state_dict(), average)
        checkpoint.save(self.run, self.model, self.optimiser, state)

    def _report(self, record: dict[str, Any] | None = None) -> StepReport:
        sums, n = self.position.sums, self.position.sums["n"]
        attacked = sums.get("attacked accuracy")
        return StepReport(
            epoch=self.position.epoch + 1,
            epochs=self.settings.epochs,
            samples=self.position.epoch * len(self.train_index) + int(n),
            total_samples=self.settings.epochs * len(self.train_index),
            loss=sums["loss"] / n,
            attacked_accuracy=None if attacked is None else attacked / n,
            epoch_record=record,
        )


def _truncate_log(path: Path, size: int) -> None:
    """Drop records that were written after the checkpoint; training writes them again."""
    try:
        if path.exists() and path.stat().st_size > size:
            with path.open("r+b") as file:
                file.truncate(size)
    except OSError as error:
        raise MexitError(f"could not write {path}: {error.strerror}; the last checkpoint is intact") from error


def _append_log(path: Path, record: dict[str, Any]) -> int:
    """Append a record and return the size of the log in bytes."""
    try:
        with path.open("ab") as file:
            file.write((json.dumps(record) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())  # the checkpoint that follows refers to this size
            return file.tell()
    except OSError as error:
        raise MexitError(f"could not write {path}: {error.strerror}; the last checkpoint is intact") from error
