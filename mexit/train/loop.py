"""The training loop: attack, forward, objective, step; a checkpoint now and then; the same for every method.

Every random number is a function of (seed, epoch, sample), so a resumed run ends in the same weights as an
uninterrupted one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mexit.core.manifest import InputSpec
from mexit.data.dataset import DataSet
from mexit.data.splits import Splits
from mexit.errors import MexitError
from mexit.train import checkpoint
from mexit.train.attacks.objective import Attack, craft
from mexit.train.augment import augment
from mexit.train.checkpoint import Progress
from mexit.train.evaluate import attacked_batches, exit_logits, right
from mexit.train.models import MultiExit, build, preset
from mexit.train.objectives import Objective, Outputs
from mexit.train.objectives import build as build_objective
from mexit.train.randomness import Draw
from mexit.train.recipe import Recipe
from mexit.train.settings import TrainSettings

CHECKPOINT_EVERY_S = 60.0
SELECTION_STEPS = 10


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
    """

    run: Path
    settings: TrainSettings
    data: DataSet
    splits: Splits
    recipe: Recipe
    watch: Callable[[Report], None] = lambda _: None
    should_stop: Callable[[], bool] = lambda: False
    model: MultiExit = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.settings.seed)
        self.model = self.recipe.place(build(self.settings.model, len(self.data.classes)))
        self.spec: InputSpec = preset(self.settings.model).input
        self.objective: Objective = build_objective(self.settings.method, self.model.exits, self.settings.options)
        self.optimiser = torch.optim.SGD(
            self.model.parameters(),
            lr=self.settings.lr,
            momentum=self.settings.momentum,
            weight_decay=self.settings.weight_decay,
        )
        self.attack = self.settings.training_attack() if self.objective.needs_attack else None
        self.train_index = self.splits.part("train")
        self.steps = -(-len(self.train_index) // self.settings.batch)
        self.progress = Progress(0, 0, {}, None, 0)
        self.kept: dict[str, Tensor] = {}

    def resume(self) -> None:
        """Continue where the checkpoint stands."""
        self.progress, self.kept = checkpoint.restore(self.run, self.model, self.optimiser)

    def train(self) -> bool:
        """Train to the end, or until `should_stop`. Returns whether the run is finished.

        Raises:
            MexitError: the loss is not finite, or a write failed; the last checkpoint is intact.
        """
        _cut_log(self.run / checkpoint.LOG, self.progress.log)
        saved = time.monotonic()
        while self.progress.epoch < self.settings.epochs:
            for sums in self._steps_left():
                step = self.progress.step + 1
                self.progress = Progress(self.progress.epoch, step, sums, self.progress.best, self.progress.log)
                self.watch(self._report())
                stop = self.should_stop()
                if stop or time.monotonic() - saved > CHECKPOINT_EVERY_S:
                    self._save()
                    saved = time.monotonic()
                if stop:
                    return False
            self._end_epoch()
            saved = time.monotonic()
        checkpoint.save_weights(self.run, self.kept, self.settings, len(self.data.classes))
        return True

    def _steps_left(self) -> Iterator[dict[str, float]]:
        """Do the rest of the epoch's steps, yielding the running sums after each."""
        draw = Draw(self.settings.seed, self.progress.epoch)
        order = self.train_index[draw.permutation(len(self.train_index))]
        sums = dict(self.progress.sums)
        for step in range(self.progress.step, self.steps):
            part = order[step * self.settings.batch : (step + 1) * self.settings.batch]
            for group in self.optimiser.param_groups:
                group["lr"] = self._lr(step)
            for name, value in self._step(part, draw, step).items():
                sums[name] = sums.get(name, 0.0) + value * len(part)
            sums["n"] = sums.get("n", 0.0) + len(part)
            yield dict(sums)

    def _step(self, part: NDArray[np.int64], draw: Draw, step: int) -> dict[str, float]:
        images = torch.from_numpy(self.data.batch(part, self.spec))
        images = self.recipe.images(augment(images, self.settings.augment, draw, torch.from_numpy(part)))
        labels = torch.from_numpy(self.data.labels[part]).to(self.recipe.device)
        index = torch.from_numpy(part).to(self.recipe.device)
        draw.seed_layers(step)
        attacked = None
        if self.attack is not None:
            attacked = craft(
                self.model, images, labels, self.attack, draw=draw, index=index, autocast=self.recipe.autocast
            )
        self.model.train()
        with self.recipe.autocast():
            clean_logits = self.model(images).float()
            attacked_logits = None if attacked is None else self.model(attacked).float()
        terms = self.objective.terms(Outputs(labels, index, clean_logits, attacked_logits, draw))
        loss = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(loss):
            raise MexitError(
                f"the loss became {float(loss.detach())} in epoch {self.progress.epoch + 1}, step {step + 1}: "
                f"lower --lr (it was {self.settings.lr}); the last checkpoint in {self.run} is intact"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        values = {"loss": float(loss.detach()), "clean accuracy": _accuracy(clean_logits, labels)}
        if attacked_logits is not None:
            values["attacked accuracy"] = _accuracy(attacked_logits, labels)
        return values | {f"loss {name}": float(term.detach()) for name, term in terms.items()}

    def _lr(self, step: int) -> float:
        """The learning rate of a step of the current epoch."""
        return self.settings.lr_at((self.progress.epoch + step / self.steps) / self.settings.epochs)

    def _end_epoch(self) -> None:
        """Judge the weights on the selection split, write the log line and the checkpoint."""
        sums, n = dict(self.progress.sums), self.progress.sums["n"]
        record: dict[str, Any] = {"epoch": self.progress.epoch + 1}
        record |= {name: round(value / n, 6) for name, value in sums.items() if name != "n"}
        record["lr"] = self._lr(self.steps - 1)
        record["selection"] = self._judge()
        score = float(np.mean(record["selection"]["attacked" if self.attack else "clean"]))
        best = self.progress.best
        if self.settings.keep == "last" or best is None or score > best:
            best = score
            self.kept = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        report = self._report(record)
        log = _append_log(self.run / checkpoint.LOG, record)
        self.progress = Progress(self.progress.epoch + 1, 0, {}, best, log)
        self._save()
        self.watch(report)

    def _judge(self) -> dict[str, list[float]]:
        """Accuracy of every exit on the selection split, clean and under a short average attack, in float32."""
        index = self.splits.part("selection")
        labels = self.data.labels[index]
        model = build(self.settings.model, len(self.data.classes))
        model.load_state_dict(self.model.state_dict())
        result = {}
        conditions: dict[str, Attack | None] = {"clean": None}
        if self.attack is not None:
            conditions["attacked"] = self.settings.test_attack("average", steps=SELECTION_STEPS)
        for name, attack in conditions.items():
            batches = attacked_batches(model, self.data, index, self.spec, attack, seed=self.settings.seed)
            result[name] = right(exit_logits(model, batches), labels).mean(axis=1).round(6).tolist()
        return result

    def _save(self) -> None:
        checkpoint.save(self.run, self.model, self.optimiser, self.progress, self.kept)

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


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.detach().argmax(dim=-1) == labels).float().mean())


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
