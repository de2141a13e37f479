"""Trains a network into a run directory: data, splits, settings, the training loop and the plot of its metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mexit.core.artifact_paths import RUNS, free_name, newest, remember
from mexit.core.progress import Progress, Silent
from mexit.data import registry
from mexit.data.dataset import DataSet
from mexit.data.groups import find_groups
from mexit.data.splits import Splits, split
from mexit.errors import BadInput, Damaged, NotFound, UsageError, requires_extra

with requires_extra("train", "Training a network"):
    from mexit.evaluate import plots
    from mexit.train import checkpoint
    from mexit.train.config import TrainSettings, resolve
    from mexit.train.dataloader import worker_count
    from mexit.train.distributed import ProcessGroup, process_group
    from mexit.train.precision import keep_freed_memory, select_precision, set_threads
    from mexit.train.teachers import own_teachers
    from mexit.train.tensorboard import FOLDER, TensorBoardWriter, require_tensorboard
    from mexit.train.trainer import StepReport, Trainer


@dataclass(frozen=True)
class TrainOptions:
    """How a run is executed. Rounding and, by the clock, the number of steps aside, no option changes the weights.

    Attributes:
        device: "auto", "cpu" or "cuda".
        threads: threads of torch on the CPU; None = all cores.
        workers: threads that load images ahead; None = one per core for image files, 0 for data in memory.
        tensorboard: whether to write TensorBoard scalars into the run as well.
        graphs: whether to use CUDA graphs on a CUDA device.
        should_stop: called after every step; True writes a checkpoint and ends training.
    """

    device: str = "auto"
    threads: int | None = None
    workers: int | None = None
    tensorboard: bool = False
    graphs: bool = True
    should_stop: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads must be at least 1, found {self.threads}")


@dataclass(frozen=True)
class TrainResult:
    """The result of `train_model`.

    Attributes:
        run: run directory.
        finished: False if `should_stop` ended training; `resume` continues the run.
        settings: the settings as stored in the run.
        seconds: duration of this call.
        records: the run's log, one record per epoch.
        curves: plot of the log, or None without matplotlib.
        is_main: False in all but the first of several processes; only the first one reports.
    """

    run: Path
    finished: bool
    settings: Mapping[str, Any]
    seconds: float
    records: tuple[Mapping[str, Any], ...]
    curves: Path | None
    is_main: bool = True


def train_model(
    data: str = "digits",
    *,
    preset: str | None = None,
    settings: Mapping[str, Any] | None = None,
    data_dir: str | Path | None = None,
    out: Path | None = None,
    resume: bool = False,
    options: TrainOptions = TrainOptions(),
    progress: Progress | None = None,
) -> TrainResult:
    """Train a network.

    In processes started by torchrun, all processes train one network together (`mexit.train.distributed`).

    Args:
        data: name of a data set, one of `data.registry.NAMES`, or "folder:PATH".
        preset: published schedule, see `train.presets`; None = the first of the data set.
        settings: fields of `train.config.TrainSettings`, such as {"method": "neo-kd", "epochs": 20}; they win over
            the preset.
        data_dir: directory of the data sets, default `MEXIT_DATA`.
        out: run directory, default a free name in `runs/`.
        resume: continue `out`, or the newest run, from its checkpoint with its stored settings.
        options: device, threads and other options that do not change the weights.
        progress: receives notes and the progress bar.

    Raises:
        UsageError: a setting is invalid, or `out` holds a run already.
        NotFound: the data set, a teacher or the run to resume does not exist.
        Damaged: a file of the data set or of the run is damaged.
        MissingExtra: torch, safetensors or TensorBoard is not installed.
        MexitError: the loss is not finite, or a write failed.
    """
    start_s = time.monotonic()
    if options.tensorboard:
        require_tensorboard()
    with process_group(options.device) as processes:
        if progress is None or not processes.is_main:
            progress = Silent()
        if resume:
            run = out or newest(RUNS, progress)
            resolved = checkpoint.load_settings(run)
            _check_unchanged(run, resolved, settings or {})
            data_set = registry.load(resolved.data, data_dir)
            splits = Splits.load(run / checkpoint.SPLITS)
            splits.check(data_set)
        else:
            data_set = registry.load(data, data_dir)
            resolved = resolve(data, preset, settings or {})
            splits = split(data_set, find_groups(data_set, resolved.group), resolved.split_seed)
            splits = splits.thinned(data_set, resolved.fraction, resolved.omit_class)
            name = f"{data_set.name.rpartition('/')[2].replace(':', '-')}-{resolved.method}"
            run = Path(processes.broadcast(str(_new_run(out, name))))
        set_threads(options.threads, processes.local_size)
        keep_freed_memory()
        session = _Session(run, data_set, splits, options, progress, processes)
        finished, resolved = session.train_with_teachers(resolved)
        records = checkpoint.read_log(run)
        curves = run / checkpoint.CURVES if records and processes.is_main and plots.available() else None
        if curves is not None:
            plots.training_curves(records, curves, f"{resolved.method}, {resolved.model}, {resolved.data}")
        seconds = time.monotonic() - start_s
        return TrainResult(run, finished, resolved.to_json(), seconds, tuple(records), curves, processes.is_main)


@dataclass(frozen=True)
class _Session:
    """One call of `train_model`: the run, and what it shares with the runs of its own teachers."""

    run: Path
    data_set: DataSet
    splits: Splits
    options: TrainOptions
    progress: Progress
    processes: ProcessGroup

    def train_with_teachers(self, settings: TrainSettings) -> tuple[bool, TrainSettings]:
        """Train the run, after the teachers that its method trains for itself.

        Returns:
            Whether the run is finished, and its settings with those teachers and, by the clock, the steps done.
        """
        teachers = own_teachers(self.run, settings)
        if teachers:
            self._create(self.run, settings)
            for teacher, teacher_settings in teachers.items():
                if not (teacher / checkpoint.WEIGHTS).exists() and not self._train(teacher, teacher_settings)[0]:
                    return False, settings
            settings = replace(settings, teachers=tuple(str(teacher) for teacher in teachers))
            self._create(self.run, settings)
        return self._train(self.run, settings)

    def _create(self, run: Path, settings: TrainSettings) -> None:
        if self.processes.is_main:
            checkpoint.create_run(run, settings, self.splits)

    def _train(self, run: Path, settings: TrainSettings) -> tuple[bool, TrainSettings]:
        """Train a run, from its checkpoint if it has one. Returns whether it is finished, and its settings."""
        precision = select_precision(settings.precision, self.options.device)
        workers = worker_count(self.data_set, self.options.workers)
        trainer = Trainer(
            run, settings, self.data_set, self.splits, precision, workers, self.processes, self.options.graphs
        )
        if self.processes.broadcast((run / checkpoint.SETTINGS).exists()):
            self._resume(trainer)
        else:
            self._create(run, settings)
        if self.processes.is_main:
            remember(RUNS, self.run)
        self.progress.note(_headline(trainer))
        if self.splits.grouping:
            self.progress.note(self.splits.grouping)
        return self._run(trainer), trainer.settings

    def _resume(self, trainer: Trainer) -> None:
        if not (trainer.run / checkpoint.CHECKPOINT).exists():
            self.progress.note(f"{trainer.run} has no checkpoint yet: starting from its settings")
            return
        trainer.resume()
        position = trainer.position
        self.progress.note(f"continuing {trainer.run} at epoch {position.epoch + 1}, step {position.step + 1}")

    def _run(self, trainer: Trainer) -> bool:
        """Run the training loop with a progress bar and TensorBoard."""
        by_clock = trainer.settings.minutes > 0
        total = int(60 * trainer.settings.minutes) or trainer.settings.epochs * len(trainer.train_index)
        write = self.options.tensorboard and self.processes.is_main
        scalars = closing(TensorBoardWriter(trainer.run / FOLDER)) if write else nullcontext()
        with self.progress.track("training, seconds" if by_clock else "training", total) as advance, scalars as writer:
            done = 0

            def on_step(report: StepReport) -> None:
                nonlocal done
                accuracy = report.attacked_accuracy
                detail = f"epoch {report.epoch}/{report.epochs}  loss {report.loss:.3f}"
                detail += "" if accuracy is None else f"  attacked {100 * accuracy:.1f}%"
                advance(report.done - done, detail)
                done = report.done
                if writer is not None:
                    writer.add(report)

            try:
                return trainer.train(on_step, self.options.should_stop)
            except (NotFound, BadInput, Damaged) as error:  # an image that was readable when the run began
                hint = f"once it can be read again: mexit train --resume --out {self.run}"
                raise type(error)(f"{error}; {hint}") from None


def _new_run(out: Path | None, name: str) -> Path:
    if out is None:
        return free_name(RUNS, name)
    if (out / checkpoint.SETTINGS).exists():
        raise UsageError(f"run {out} exists already: continue it with --resume --out {out}, or choose another --out")
    return out


def _check_unchanged(run: Path, stored: TrainSettings, given: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings than its own."""
    for name, value in given.items():
        own = getattr(stored, name, None)
        value = tuple(value) if isinstance(value, list) else value
        if isinstance(value, Mapping):
            value = {**stored.options, **value}  # options of the preset stay
        if value is not None and value != own:
            raise UsageError(
                f"--resume continues {run} with its own settings, and {name} is {own}, not {value}: leave "
                f"--{name.replace('_', '-')} out, or begin another run with --out"
            )


def _headline(trainer: Trainer) -> str:
    settings, precision, processes = trainer.settings, trainer.precision, trainer.process_group.size
    attack = trainer.attack.describe() if trainer.attack else "no attack"
    length = f"{settings.minutes:g} minutes" if settings.minutes else f"{settings.epochs} epochs"
    return (
        f"training {settings.model} on {settings.data} with {settings.method}: {len(trainer.train_index)} images, "
        f"{length}, {attack}, {'bf16' if precision.bf16 else 'fp32'} on {precision.device}, "
        f"{f'{processes} processes, ' if processes > 1 else ''}into {trainer.run}"
    )
