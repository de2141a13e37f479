"""The training loop: batches, steps, checkpoints, validation and the log; the same for every training method.

Every random number is a function of (seed, epoch, sample), so a resumed run ends with the same weights as an
uninterrupted one, except a run by the clock, whose number of steps depends on the machine.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mexit.attacks.pgd import Attack
from mexit.attacks.rng import CounterRNG
from mexit.data.dataset import DataSet, split_batches
from mexit.data.splits import Splits
from mexit.errors import MexitError, UsageError
from mexit.models import MultiExit
from mexit.train import checkpoint
from mexit.train.batches import INFERENCE_BATCH, TrainBatches, recompute_norms
from mexit.train.checkpoint import START, Position, TrainState
from mexit.train.config import TrainSettings
from mexit.train.cuda_graphs import StepGraphs
from mexit.train.distributed import SINGLE_PROCESS, ProcessGroup
from mexit.train.frozen_settings import weights_of_heads
from mexit.train.methods import build_method
from mexit.train.methods.base import Adaptation, Batch, Setup, StepInfo
from mexit.train.optimiser import build_optimiser, set_lr
from mexit.train.precision import Precision
from mexit.train.regularizers import EMA
from mexit.train.run_clock import RunClock
from mexit.train.step_report import StepReport
from mexit.train.teachers import load_teachers
from mexit.train.train_step import StepMetrics, TrainStep
from mexit.train.validation import attacked_batches, correct_predictions, exit_logits

CHECKPOINT_INTERVAL_S = 60.0
UNKNOWN_EPOCHS = 1_000_000  # of a run by the clock before its first step


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
        graphs: whether a step on a CUDA device runs the network by CUDA graphs; several processes train without.
        position: position in the schedule.
        progress: fraction of the run that is done, in [0, 1].
        kept: the weights that would be the result if training ended at `position`.
    """

    run: Path
    settings: TrainSettings
    data: DataSet
    splits: Splits
    precision: Precision
    workers: int = 0
    process_group: ProcessGroup = SINGLE_PROCESS
    graphs: bool = True
    position: Position = field(default=START, init=False)
    progress: float = field(default=0.0, init=False)
    kept: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        settings, precision = self.settings, self.precision
        torch.manual_seed(settings.seed)
        self.model = precision.prepare(self._initial())
        self.model.fixed_norms = settings.freeze
        self.input = settings.model_spec().input
        self.attack = settings.training_attack()
        self.optimiser = build_optimiser(self.model, settings)
        self.ema = EMA(settings.ema) if settings.ema else None
        self.method = build_method(settings.method, settings.options)
        teachers = load_teachers(settings, self.data.classes, precision)
        self.method.setup(
            Setup(
                self.model.exits, self.model.classes, precision.device, teachers, precision.autocast, self.model,
                self.process_group, settings.data,
            )
        )  # fmt: skip
        if settings.exit_weights and len(settings.exit_weights) != self.model.exits:
            raise UsageError(
                f"{settings.model} has {self.model.exits} exits: give one exit weight for each, "
                f"found {len(settings.exit_weights)}"
            )
        self._set_exit_weights()
        copy = precision.attack_copy(self.model)
        graphs = None
        if self.graphs and precision.device == "cuda" and self.process_group.size == 1:
            plain = self.method.differentiates_gradients
            graphs = StepGraphs(self.model, precision.autocast, settings.batch, copy, forward_graphs=not plain)
        self.train_step = TrainStep(
            self.model, self.method, self.optimiser, settings, self.ema, copy, self.process_group, graphs
        )
        self.train_index = self.splits.part("train")
        self.process_group.check_batch(settings.batch, len(self.train_index))
        self.steps_per_epoch = -(-len(self.train_index) // settings.batch)
        self.batches = TrainBatches(self.data, self.splits, self.input, settings, self.model, precision, self.workers)
        self.lr = settings.lr_at(0.0)
        selection = len(self.splits.part("selection"))
        self.clock = RunClock(settings, self.model.exits, len(self.train_index), selection)
        # Number, metrics and samples of the newest steps: with graphs, reading the metrics would wait for the step.
        self._unread: deque[tuple[int, StepMetrics, int]] = deque()

    def resume(self) -> None:
        """Restore the state of the checkpoint. Raises `NotFound` or `Damaged`, see `checkpoint.restore`."""
        state = checkpoint.restore(self.run, self.model, self.optimiser)
        self.position, self.kept = state.position, dict(state.kept)
        if not checkpoint.is_finished(state.position, self.settings):
            self.position = replace(state.position, steps_done=0)  # the run ended by the clock before it was extended
        if self._step_number and not self.settings.minutes:
            last_step = self._step_number - 1
            self.lr = self.settings.lr_at(last_step / (self.steps_per_epoch * self.settings.epochs))
        if state.method:
            self.method.load_state_dict(state.method)
        if self.ema is not None:
            self.ema.weights = {name: value.to(self.precision.device) for name, value in state.average.items()}

    def start_from_heads(self, accuracy: Sequence[float]) -> None:
        """Start from the weights of `model`, whose heads were trained before, and write log and checkpoint.

        Args:
            accuracy: of each exit on the clean images of the selection split, (E,).
        """
        if not self.settings.exit_weights:
            self.settings = replace(self.settings, exit_weights=weights_of_heads(accuracy, self.model.classes))
            self._set_exit_weights()
            checkpoint.save_settings(self.run, self.settings)
        self.kept = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        log_bytes = checkpoint.append_log(self.run, {"epoch": 0, "selection": {"clean": list(accuracy)}})
        best = None if self.attack else float(np.mean(accuracy))
        self.position = replace(START, best=best, log=log_bytes)
        self.clock.start(0.0, 0.0, 0)
        self._save_checkpoint()

    def _set_exit_weights(self) -> None:
        weights = self.settings.exit_weights
        self.exit_weights = torch.tensor(weights, device=self.precision.device) if weights else None

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
            checkpoint.truncate_log(self.run, self.position.log)
        self.clock.start(self.position.elapsed_s, self._epochs_done / max(1, self.settings.epochs), self._samples)
        saved_s = time.monotonic()
        while not self._finished:
            for _ in self._remaining_steps():
                self.position = replace(self.position, step=self.position.step + 1)
                self.progress = self._measure_progress()
                on_step(self._report())
                stop = self.process_group.any(should_stop())
                if stop or time.monotonic() - saved_s > CHECKPOINT_INTERVAL_S:
                    self._save_checkpoint()
                    saved_s = time.monotonic()
                if stop:
                    return False
                if self.progress >= 1:
                    break
            last = self.progress >= 1
            steps_done = self._step_number if last and self.settings.minutes else 0
            if self.process_group.is_main:
                on_step(self._end_epoch(last, steps_done))
            else:
                self.position = replace(START, epoch=self.position.epoch + 1, steps_done=steps_done)
            saved_s = time.monotonic()
        self.settings = replace(self.settings, steps_done=self.position.steps_done)
        if self.process_group.is_main:
            if self.settings.minutes:
                checkpoint.save_settings(self.run, self.settings)
            checkpoint.save_weights(self.run, self.kept, self.settings, len(self.data.classes))
        return self.process_group.broadcast(True)  # the other processes wait until the weights are written

    @property
    def _finished(self) -> bool:
        if self.settings.minutes:
            return self.position.steps_done > 0
        return self.position.epoch >= self.settings.epochs

    @property
    def _step_number(self) -> int:
        """Number of the next step in the run, from 0."""
        return self.position.epoch * self.steps_per_epoch + self.position.step

    @property
    def _expected_epochs(self) -> int:
        """Epochs of the run; in a run by the clock an extrapolation of the time per epoch so far."""
        if not self.settings.minutes:
            return self.settings.epochs
        epochs = self._epochs_done / self.progress if self.progress > 0 else UNKNOWN_EPOCHS
        return max(self.position.epoch + 1, round(epochs))

    @property
    def _epochs_done(self) -> float:
        return self._step_number / self.steps_per_epoch

    @property
    def _samples(self) -> int:
        """Samples processed in all epochs."""
        in_epoch = min(self.position.step * self.settings.batch, len(self.train_index))
        return self.position.epoch * len(self.train_index) + in_epoch

    def _measure_progress(self) -> float:
        """The fraction of the run that is done, the same in every process."""
        if not self.settings.minutes:
            return self._epochs_done / self.settings.epochs
        return self.process_group.broadcast(self.clock.share(self._samples))

    def _remaining_steps(self) -> Iterator[None]:
        """Run the remaining steps of the epoch; yield after each."""
        self.progress = self._measure_progress()
        rng = CounterRNG(self.settings.seed, self.position.epoch)
        order = self.train_index[rng.permutation(len(self.train_index))]
        if self.position.step == 0:
            self.method.begin_epoch(self.position.epoch, self._expected_epochs, self._iterate_train_logits)
        first, size = self.position.step, self.settings.batch
        batches = [order[step * size : (step + 1) * size] for step in range(first, self.steps_per_epoch)]
        shards = [batch[self.process_group.shard(len(batch))] for batch in batches]
        with closing(self.batches.load(shards, rng)) as loaded:
            for step, batch in enumerate(loaded, start=first):
                count = len(batches[step - first])
                batch = replace(batch, attack=self.settings.training_attack(self.progress))
                self._unread.append((step, self._run_step(batch, step, len(batch.labels) / count), count))
                self._read_metrics(0 if self.train_step.graphs is None else 1)
                yield

    def _read_metrics(self, unread: int = 0) -> None:
        """Add the metrics of all but the newest `unread` steps to the sums of the epoch."""
        sums = dict(self.position.sums)
        while len(self._unread) > unread or (self._unread and "n" not in sums):
            step, metrics, count = self._unread.popleft()
            values = metrics.read()
            if not math.isfinite(values["loss"]):
                raise MexitError(
                    f"the loss became {values['loss']} in epoch {self.position.epoch + 1}, step {step + 1}: "
                    f"lower --lr (it was {self.settings.lr:g}){checkpoint.intact(self.run)}"
                )
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value * count
            sums["n"] = sums.get("n", 0.0) + count
        self.position = replace(self.position, sums=sums)

    def _run_step(self, batch: Batch, step: int, share: float) -> StepMetrics:
        lr = self.lr = self.settings.lr_at(self.progress)
        set_lr(self.optimiser, lr)
        batch.rng.seed_layers(step * self.process_group.size + self.process_group.rank)
        adaptation = Adaptation(
            self.model, lr, lambda: self.batches.selection(batch.rng, step), self.precision.autocast
        )
        number = self.position.epoch * self.steps_per_epoch + step
        info = StepInfo(number, self.progress, share, self.settings.label_smoothing, self.exit_weights)
        return self.train_step.run(batch, adaptation, info)

    def _iterate_train_logits(self, attacked: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (E, B, C) and labels (B,) of this process's training images, in train mode, without gradients."""
        rng = CounterRNG(self.settings.seed, self.position.epoch)
        rng.seed_layers(-1)  # torch's generator is in another state in a resumed run
        shard = self.train_index[self.process_group.shard(len(self.train_index))]
        batches = split_batches(shard, INFERENCE_BATCH)
        with closing(self.batches.load(batches, rng)) as loaded:
            for batch in loaded:
                variants = self.train_step.craft(batch) if attacked else None
                self.model.train()
                with torch.no_grad(), self.precision.autocast():
                    yield self.model(batch.images if variants is None else variants[0]).float(), batch.labels

    def _end_epoch(self, last: bool, steps_done: int) -> StepReport:
        """Validate, update the weights to keep, write the log record and the checkpoint.

        `last` says whether the run ends here, and `steps_done` after how many steps if it is one by the clock.
        """
        self._read_metrics()
        position, settings = self.position, self.settings
        record: dict[str, Any] = {"epoch": position.epoch + 1}
        record |= {name: round(value / position.sums["n"], 6) for name, value in position.sums.items() if name != "n"}
        record["lr"] = self.lr
        record |= self.method.report()
        best = position.best
        if last or (position.epoch + 1) % settings.validate_every == 0:
            weights = self._result_weights(last)
            start_s = time.monotonic()
            record["selection"] = self._validate(weights)
            self.clock.add_validation(time.monotonic() - start_s)
            score = float(np.mean(record["selection"]["attacked" if self.attack else "clean"]))
            if settings.keep == "last" or best is None or score > best:
                best = score
                self.kept = {name: value.detach().clone() for name, value in weights.items()}
        report = self._report(record)
        log_bytes = checkpoint.append_log(self.run, record)
        self.position = Position(position.epoch + 1, 0, {}, best, log_bytes, steps_done=steps_done)
        self._save_checkpoint()
        return report

    def _validate(self, weights: Mapping[str, Tensor]) -> dict[str, list[float]]:
        """Accuracy of every exit on the selection split, clean and under a short average attack, in float32."""
        index = self.splits.part("selection")
        labels = self.data.labels[index]
        model = self._network(weights)
        conditions: dict[str, Attack | None] = {"clean": None}
        if self.attack is not None:
            conditions["attacked"] = self.settings.test_attack("average", steps=self.settings.selection_steps)
        accuracy = {}
        for name, attack in conditions.items():
            batches = attacked_batches(model, self.data, index, self.input, attack, seed=self.settings.seed)
            correct = correct_predictions(exit_logits(model, batches), labels)
            accuracy[name] = correct.mean(axis=1).round(6).tolist()
        return accuracy

    def _build(self) -> MultiExit:
        """A freshly initialised network of the run."""
        return self.settings.model_spec().build(len(self.data.classes))

    def _initial(self) -> MultiExit:
        """The network that a new run starts from: a pretrained one, where there is one."""
        build = self.settings.model_spec().initial
        if build is None or (self.run / checkpoint.CHECKPOINT).exists():
            return self._build()
        return build(len(self.data.classes))

    def _network(self, weights: Mapping[str, Tensor]) -> MultiExit:
        """A float32 network with these weights, on the device."""
        model = self._build().to(self.precision.device)
        model.load_state_dict(weights)
        return model

    def _result_weights(self, last: bool) -> Mapping[str, Tensor]:
        """The averaged weights where there is an average, else the weights of the network.

        At the end of a run with `recompute_norms`, BatchNorm's statistics are measured again.
        """
        weights: Mapping[str, Tensor] = self.model.state_dict() if self.ema is None else self.ema.weights
        if not (last and self.settings.recompute_norms):
            return weights
        return recompute_norms(self._network(weights), self.batches, self.position.epoch)

    def _save_checkpoint(self) -> None:
        if not self.process_group.is_main:
            return
        average = {} if self.ema is None else self.ema.weights
        self._read_metrics()
        # A run by the clock that ended has used its time, also where its last validation took less than expected.
        used_s = 60 * self.settings.minutes if self.position.steps_done else 0.0
        position = replace(self.position, elapsed_s=max(self.clock.elapsed_s(), used_s))
        state = TrainState(position, self.kept, self.method.state_dict(), average)
        checkpoint.save(self.run, self.model, self.optimiser, state)

    def _report(self, record: dict[str, Any] | None = None) -> StepReport:
        sums, n = self.position.sums, self.position.sums["n"]
        attacked = sums.get("attacked accuracy")
        total_s = int(60 * self.settings.minutes)
        epochs, every = self.settings.epochs, self.settings.validate_every
        validations = -(-epochs // every) - (self.position.epoch + (record is not None)) // every
        return StepReport(
            epoch=self.position.epoch + 1,
            epochs=self._expected_epochs,
            samples=self._samples,
            done=round(self.progress * total_s) if total_s else self._samples,
            total=total_s or epochs * len(self.train_index),
            remaining_s=self.clock.remaining_s(self.progress, self._samples, validations),
            clean_accuracy=sums["clean accuracy"] / n,
            loss=sums["loss"] / n,
            attacked_accuracy=None if attacked is None else attacked / n,
            epoch_record=record,
        )
