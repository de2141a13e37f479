"""The training loop: attack, forward, objective, step; a checkpoint now and then; the same for every method.

Every random number is a function of (seed, epoch, sample), so a resumed run ends in the same weights as an
uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mexit.attacks.multi_exit_attack import Attack
from mexit.attacks.rng import CounterRNG
from mexit.core.batches import split_batches
from mexit.core.manifest import InputSpec
from mexit.data.dataset import DataSet
from mexit.data.splits import Splits
from mexit.errors import MexitError
from mexit.models import MultiExit, build_model, model_spec
from mexit.train import checkpoint
from mexit.train.augment import augment
from mexit.train.checkpoint import Place, Progress
from mexit.train.config import TrainSettings
from mexit.train.dataloader import prepared
from mexit.train.distributed import ALONE, ProcessGroup
from mexit.train.methods import TrainingMethod, build_method
from mexit.train.methods.base import Adaptation, Batch, Setup
from mexit.train.precision import Precision
from mexit.train.regularizers import Average
from mexit.train.teachers import load_teachers
from mexit.train.train_step import Step
from mexit.train.validation import attacked_batches, exit_logits, right

CHECKPOINT_EVERY_S = 60.0
SELECTION_STEPS = 10
SWEEP = 256


@dataclass(frozen=True)
class Report:
    """What the loop tells its watcher after every step.

    Attributes:
        epoch, epochs: the current one (from 1), and how many.
        samples, total: done in all epochs together, and to do.
        loss: mean of the epoch so far.
        attacked_accuracy: of the training batches so far, mean over exits; None without an attack.
        epoch_record: the log line, at the end of an epoch; None otherwise.
    """

    epoch: int
    epochs: int
    samples: int
    total: int
    loss: float
    attacked_accuracy: float | None
    epoch_record: dict[str, Any] | None = None


@dataclass
class Trainer:
    """One run under way.

    Attributes:
        run: its directory.
        settings: what decides the weights.
        data, splits: what it trains on.
        recipe: device and precision.
        watch: told after every step.
        should_stop: asked after every step; True ends the run after a checkpoint.
        workers: threads that prepare batches ahead; see `batches`.
        team: the processes that train together; the first one judges, writes and reports.
    """

    run: Path
    settings: TrainSettings
    data: DataSet
    splits: Splits
    recipe: Precision
    watch: Callable[[Report], None] = lambda _: None
    should_stop: Callable[[], bool] = lambda: False
    workers: int = 0
    team: ProcessGroup = ALONE
    model: MultiExit = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.settings.seed)
        self.model = self.recipe.place(build_model(self.settings.model, len(self.data.classes)))
        self.spec: InputSpec = model_spec(self.settings.model).input
        self.objective: TrainingMethod = build_method(self.settings.method, self.settings.options)
        self.optimiser = torch.optim.SGD(
            self.model.parameters(),
            lr=self.settings.lr,
            momentum=self.settings.momentum,
            weight_decay=self.settings.weight_decay,
        )
        teachers = load_teachers(self.settings, self.data.classes, self.recipe)
        self.objective.setup(
            Setup(
                self.model.exits,
                self.model.classes,
                self.recipe.device,
                teachers,
                self.recipe.autocast,
                self.model,
                self.team,
                self.settings.data,
            )
        )
        self.attack = self.settings.training_attack()
        self.average = Average(self.settings.ema) if self.settings.ema else None
        self.step = Step(
            self.model,
            self.objective,
            self.optimiser,
            self.settings,
            self.average,
            self.recipe.attack_copy(self.model),
            self.team,
        )
        self.train_index = self.splits.part("train")
        self.team.check(self.settings.batch, len(self.train_index))
        self.steps = -(-len(self.train_index) // self.settings.batch)
        self.progress = Progress(0, 0, {}, None, 0)
        self.kept: dict[str, Tensor] = {}

    def resume(self) -> None:
        """Continue where the checkpoint stands."""
        place = checkpoint.restore(self.run, self.model, self.optimiser)
        self.progress, self.kept = place.progress, dict(place.kept)
        if place.objective:
            self.objective.load_state_dict(place.objective)
        if self.average is not None:
            self.average.weights = dict(place.average)

    def train(self) -> bool:
        """Train to the end, or until `should_stop`. Returns whether the run is finished.

        Raises:
            MexitError: the loss is not finite, or a write failed; the last checkpoint is intact.
        """
        if self.team.leads:
            _cut_log(self.run / checkpoint.LOG, self.progress.log)
        saved = time.monotonic()
        while self.progress.epoch < self.settings.epochs:
            for sums in self._steps_left():
                step = self.progress.step + 1
                self.progress = Progress(self.progress.epoch, step, sums, self.progress.best, self.progress.log)
                self.watch(self._report())
                stop = self.team.any(self.should_stop())
                if stop or time.monotonic() - saved > CHECKPOINT_EVERY_S:
                    self._save()
                    saved = time.monotonic()
                if stop:
                    return False
            self._end_epoch()
            saved = time.monotonic()
        if self.team.leads:
            checkpoint.save_weights(self.run, self.kept, self.settings, len(self.data.classes))
        return self.team.agree(True)  # the others wait until the weights are there

    def _steps_left(self) -> Iterator[dict[str, float]]:
        """Do the rest of the epoch's steps, yielding the running sums after each."""
        draw = CounterRNG(self.settings.seed, self.progress.epoch)
        order = self.train_index[draw.permutation(len(self.train_index))]
        sums = dict(self.progress.sums)
        if self.progress.step == 0:
            self.objective.begin_epoch(self.progress.epoch, self.settings.epochs, self._sweep)
        first, size = self.progress.step, self.settings.batch
        wholes = [order[step * size : (step + 1) * size] for step in range(first, self.steps)]
        parts = [whole[self.team.share(len(whole))] for whole in wholes]
        with closing(self._batches(parts, draw)) as batches:
            for step, batch in enumerate(batches, start=first):
                for group in self.optimiser.param_groups:
                    group["lr"] = self._lr(step)
                count = len(wholes[step - first])
                for name, value in self._take(batch, draw, step, len(batch.labels) / count).items():
                    sums[name] = sums.get(name, 0.0) + value * count
                sums["n"] = sums.get("n", 0.0) + count
                yield dict(sums)

    def _take(self, batch: Batch, draw: CounterRNG, step: int, share: float) -> dict[str, float]:
        draw.seed_layers(step * self.team.size + self.team.rank)
        adaptation = Adaptation(
            self.model, self._lr(step), lambda: self._selection_batch(draw, step), self.recipe.autocast
        )
        number = self.progress.epoch * self.steps + step
        found = self.step.take(batch, adaptation, number / (self.steps * self.settings.epochs), number, share)
        if not math.isfinite(found["loss"]):
            raise MexitError(
                f"the loss became {found['loss']} in epoch {self.progress.epoch + 1}, step {step + 1}: "
                f"lower --lr (it was {self.settings.lr}); the last checkpoint in {self.run} is intact"
            )
        return found

    def _batches(self, parts: Sequence[NDArray[np.int64]], draw: CounterRNG) -> Generator[Batch, None, None]:
        with closing(prepared(self.data, parts, self.spec, self.workers)) as ready:
            for part, images in zip(parts, ready, strict=True):
                yield self._batch(torch.from_numpy(images), part, draw)

    def _batch(self, images: Tensor, part: NDArray[np.int64], draw: CounterRNG) -> Batch:
        images = self.recipe.images(augment(images, self.settings.augment, draw, torch.from_numpy(part)))
        labels = torch.from_numpy(self.data.labels[part]).to(self.recipe.device)
        index = torch.from_numpy(part).to(self.recipe.device)
        return Batch(self.model, images, labels, index, self.attack, draw, self.recipe.autocast)

    def _selection_batch(self, draw: CounterRNG, step: int) -> tuple[Tensor, Tensor]:
        """Images and labels of the selection split, another random batch at every step."""
        index = self.splits.part("selection")
        chosen = index[draw.choice(len(index), self.settings.batch, step)]
        images = self.recipe.images(torch.from_numpy(self.data.batch(chosen, self.spec)))
        return images, torch.from_numpy(self.data.labels[chosen]).to(self.recipe.device)

    def _sweep(self, attacked: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (E, B, C) and labels of this process's training images, in train mode, without gradients."""
        draw = CounterRNG(self.settings.seed, self.progress.epoch)
        draw.seed_layers(-1)  # a resumed run comes here with another state of torch's generator
        mine = self.train_index[self.team.share(len(self.train_index))]
        parts = split_batches(mine, SWEEP)
        with closing(self._batches(parts, draw)) as batches:
            for batch in batches:
                images = self.step.craft(batch) if attacked else None
                self.model.train()
                with torch.no_grad(), self.recipe.autocast():
                    yield self.model(batch.images if images is None else images[0]).float(), batch.labels

    def _lr(self, step: int) -> float:
        """The learning rate of a step of the current epoch."""
        return self.settings.lr_at((self.progress.epoch + step / self.steps) / self.settings.epochs)

    def _end_epoch(self) -> None:
        """Judge the weights on the selection split, write the log line and the checkpoint."""
        if not self.team.leads:
            self.progress = Progress(self.progress.epoch + 1, 0, {}, None, 0)
            return
        sums, n = dict(self.progress.sums), self.progress.sums["n"]
        record: dict[str, Any] = {"epoch": self.progress.epoch + 1}
        record |= {name: round(value / n, 6) for name, value in sums.items() if name != "n"}
        record["lr"] = self._lr(self.steps - 1)
        record |= self.objective.report()
        record["selection"] = self._judge()
        score = float(np.mean(record["selection"]["attacked" if self.attack else "clean"]))
        best = self.progress.best
        if self.settings.keep == "last" or best is None or score > best:
            best = score
            self.kept = {name: value.detach().clone() for name, value in self._weights().items()}
        report = self._report(record)
        log = _append_log(self.run / checkpoint.LOG, record)
        self.progress = Progress(self.progress.epoch + 1, 0, {}, best, log)
        self._save()
        self.watch(report)

    def _judge(self) -> dict[str, list[float]]:
        """Accuracy of every exit on the selection split, clean and under a short average attack, in float32."""
        index = self.splits.part("selection")
        labels = self.data.labels[index]
        model = build_model(self.settings.model, len(self.data.classes))
        model.load_state_dict(self._weights())
        result = {}
        conditions: dict[str, Attack | None] = {"clean": None}
        if self.attack is not None:
            conditions["attacked"] = self.settings.test_attack("average", steps=SELECTION_STEPS)
        for name, attack in conditions.items():
            batches = attacked_batches(model, self.data, index, self.spec, attack, seed=self.settings.seed)
            result[name] = right(exit_logits(model, batches), labels).mean(axis=1).round(6).tolist()
        return result

    def _weights(self) -> Mapping[str, Tensor]:
        """What would be kept now: the averaged weights where there are any."""
        weights: Mapping[str, Tensor] = self.model.state_dict()
        return weights if self.average is None else self.average.weights

    def _save(self) -> None:
        if not self.team.leads:
            return
        average = {} if self.average is None else self.average.weights
        place = Place(self.progress, self.kept, self.objective.state_dict(), average)
        checkpoint.save(self.run, self.model, self.optimiser, place)

    def _report(self, record: dict[str, Any] | None = None) -> Report:
        sums, n = self.progress.sums, self.progress.sums["n"]
        done = self.progress.epoch * len(self.train_index) + int(n)
        attacked = sums.get("attacked accuracy")
        return Report(
            epoch=self.progress.epoch + 1,
            epochs=self.settings.epochs,
            samples=done,
            total=self.settings.epochs * len(self.train_index),
            loss=sums["loss"] / n,
            attacked_accuracy=None if attacked is None else attacked / n,
            epoch_record=record,
        )


def _cut_log(path: Path, size: int) -> None:
    """Drop lines that were written after the checkpoint; they will be written again."""
    try:
        if path.exists() and path.stat().st_size > size:
            with path.open("r+b") as file:
                file.truncate(size)
    except OSError as error:
        raise MexitError(f"could not write {path}: {error.strerror}; the last checkpoint is intact") from error


def _append_log(path: Path, record: dict[str, Any]) -> int:
    try:
        with path.open("ab") as file:
            file.write((json.dumps(record) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())  # the checkpoint that follows counts on it
            return file.tell()
    except OSError as error:
        raise MexitError(f"could not write {path}: {error.strerror}; the last checkpoint is intact") from error
