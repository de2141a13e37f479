"""Trains a network into a run directory: data, splits, settings, the training loop and the plot of its metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mexit.core.artifact_paths import RUNS, newest, plain_name, remember
from mexit.core.printable import shell_path
from mexit.core.progress import Progress, Silent
from mexit.core.resource_limits import check_threads
from mexit.data import registry
from mexit.data.dataset import DataSet, FileImages
from mexit.data.groups import find_groups
from mexit.data.known_pictures import MAX_KNOWN, fingerprints
from mexit.data.registry import is_folder
from mexit.data.splits import Splits, split
from mexit.errors import BadInput, Damaged, NotFound, UsageError, requires_extra
from mexit.flows.data import check_data, note_grey_bits, note_splits
from mexit.flows.epoch_lines import EpochLines, step_line

with requires_extra("train", "Training a network"):
    from mexit.evaluate import plots
    from mexit.flows.fit_pictures import check_network, fit_settings, normalise, read_pictures
    from mexit.flows.train_headline import headline
    from mexit.train import checkpoint
    from mexit.train.changed_settings import change_settings, describe_change
    from mexit.train.config import TrainSettings, resolve
    from mexit.train.dataloader import worker_count
    from mexit.train.distributed import ProcessGroup, process_group
    from mexit.train.frozen_heads import train_heads
    from mexit.train.precision import keep_freed_memory, select_precision, set_threads
    from mexit.train.run_directory import existing_run, has_progress, new_run
    from mexit.train.step_report import StepReport
    from mexit.train.teachers import own_teachers
    from mexit.train.tensorboard import FOLDER, TensorBoardWriter, require_tensorboard
    from mexit.train.trainer import Trainer


@dataclass(frozen=True)
class TrainOptions:
    """How a run is executed. Rounding and, by the clock, the number of steps aside, no option changes the weights.

    Attributes:
        device: "auto", "cpu" or "cuda".
        threads: threads of torch on the CPU; None = all cores.
        workers: threads that load images ahead; None = one per core for image files, 0 for data in memory.
        tensorboard: whether to write TensorBoard scalars into the run as well.
        graphs: whether to use CUDA graphs on a CUDA device.
        cache: whether to keep images of files in memory, if they fit into a quarter of it.
        on_ready: called when the pictures are read, before anything of the run is stored.
        should_stop: called after every step; True writes a checkpoint and ends training.
    """

    device: str = "auto"
    threads: int | None = None
    workers: int | None = None
    tensorboard: bool = False
    graphs: bool = True
    cache: bool = True
    on_ready: Callable[[], None] = lambda: None
    should_stop: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        if self.threads is not None:
            check_threads(self.threads)


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
    data: str | None = None,
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
        data: name of a data set, one of `data.registry.NAMES`, or "folder:PATH". Default: digits, with `resume` that of
            the run.
        preset: published schedule, see `train.presets`; None = the first of the data set.
        settings: fields of `train.config.TrainSettings`, such as {"method": "neo-kd", "epochs": 20}; they win over
            the preset. {"robust": 8 / 255} trains against attacks of that radius. {"freeze": True} trains the heads of
            a pretrained network only, and {"finetune": 5} all layers for 5 epochs after that. For a folder, what is
            not given is chosen from the pictures and the time, see `train.picture_defaults`.
        data_dir: directory of the data sets, default `MEXIT_DATA`.
        out: run directory, default a free name in `runs/`.
        resume: continue `out`, or the newest run, from its checkpoint with its stored settings. Of `settings`, those in
            `train.changed_settings.CHANGEABLE` may differ: they are stored and hold from there on.
        options: device, threads and other options that do not change the weights.
        progress: receives notes and the progress bar.

    Raises:
        UsageError: a setting is invalid or cannot change on `resume`, `out` holds a run already, or another process
            trains it.
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
        set_threads(options.threads, processes.local_size)
        keep_freed_memory()
        with ExitStack() as stack:
            opening = _Opening(stack, data_dir, options, progress, processes)
            if resume:
                run, named = out or newest(RUNS, progress), None if data is None else registry.canonical_name(data)
                session, resolved = opening.stopped(run, named, preset, settings or {})
            else:
                name = registry.canonical_name(data or "digits")
                session, resolved = opening.new(out, name, preset, settings or {})
            finished, resolved = session.train_with_teachers(resolved)
        return _result(session, finished, resolved, time.monotonic() - start_s)


def _result(session: _Session, finished: bool, settings: TrainSettings, seconds: float) -> TrainResult:
    """The result of a call, with a plot of the log where matplotlib is installed."""
    run, is_main = session.run, session.processes.is_main
    records = checkpoint.read_log(run)
    curves = run / checkpoint.CURVES if records and is_main and plots.available() else None
    if curves is not None:
        plots.training_curves(records, curves, f"{settings.kind}, {settings.model}, {settings.data}")
    return TrainResult(run, finished, settings.to_json(), seconds, tuple(records), curves, is_main)


@dataclass(frozen=True)
class _Opening:
    """Opens the directory of a run, with its data, splits and settings; `stack` closes it."""

    stack: ExitStack
    data_dir: str | Path | None
    options: TrainOptions
    progress: Progress
    processes: ProcessGroup

    def stopped(
        self, run: Path, data: str | None, preset: str | None, given: Mapping[str, Any]
    ) -> tuple[_Session, TrainSettings]:
        """Continue a run, with the given changes of its settings. It becomes the newest run unless it is refused."""
        self.processes.on_main(lambda: self.stack.enter_context(existing_run(run)))
        settings = _changed(run, given, data, preset)
        data_set = registry.load(settings.data, self.data_dir)
        splits = Splits.load(run / checkpoint.SPLITS)
        splits.check(data_set)
        self.processes.on_main(lambda: remember(RUNS, run))
        return self._session(run, self._read(data_set, splits, settings), splits), settings

    def new(
        self, out: Path | None, data: str, preset: str | None, given: Mapping[str, Any]
    ) -> tuple[_Session, TrainSettings]:
        """Begin a run; for a folder, what is not given is chosen from the pictures and the time."""
        processes, progress = self.processes, self.progress
        data_set = registry.load(data, self.data_dir)
        settings = resolve(data, preset, given)
        check_network(settings, given, len(data_set.classes))
        name = plain_name(f"{data_set.name.rpartition('/')[2].replace(':', '-')}-{settings.kind}")
        run = processes.on_main(lambda: self.stack.enter_context(new_run(out, name)))
        scan = processes.on_main(lambda: check_data(data_set, progress))
        splits = split(data_set, find_groups(data_set, settings.group, progress), settings.split_seed)
        note_splits(data_set, splits, progress)
        settings = replace(settings, grey_bits=note_grey_bits(scan, splits, progress))
        if isinstance(data_set.images, FileImages) and is_folder(data) and len(data_set) <= MAX_KNOWN:
            splits = replace(splits, fingerprints=fingerprints(data_set.images))
        splits = splits.thinned(data_set, settings.fraction, settings.omit_class)
        settings = fit_settings(settings, given, data_set, splits, self.options.device, progress)
        settings = processes.broadcast(settings)  # each process has measured its own speed
        data_set = self._read(data_set, splits, settings)
        return self._session(run, data_set, splits), normalise(settings, data_set, splits)

    def _read(self, data: DataSet, splits: Splits, settings: TrainSettings) -> DataSet:
        if not self.options.cache or settings.heads_only:  # heads read each picture once
            return data
        return read_pictures(data, splits, settings, self.options.workers, self.progress)

    def _session(self, run: Path, data: DataSet, splits: Splits) -> _Session:
        return _Session(run, data, splits, self.options, self.progress, self.processes)


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
        self.options.on_ready()
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
            self._store_changes(trainer)
        else:
            self._create(run, settings)
        self.progress.note(headline(trainer))
        if self.splits.grouping:
            self.progress.note(self.splits.grouping)
        if settings.freeze and not (run / checkpoint.CHECKPOINT).exists() and not self._train_heads(trainer):
            return False, trainer.settings
        return self._run(trainer), trainer.settings

    def _train_heads(self, trainer: Trainer) -> bool:
        """Train the heads on the frozen network. Returns whether they are complete."""
        if self.processes.size > 1:
            raise UsageError(
                "--freeze trains the heads in one process: start it without torchrun; --resume --finetune N takes any "
                "number of processes after that"
            )
        model, workers, should_stop = trainer.model, trainer.workers, self.options.should_stop
        accuracy = train_heads(model, trainer.settings, self.data_set, self.splits, workers, self.progress, should_stop)
        if accuracy is None:
            return False
        trainer.start_from_heads(accuracy)
        return True

    def _resume(self, trainer: Trainer) -> None:
        if not (trainer.run / checkpoint.CHECKPOINT).exists():
            self.progress.note(f"{trainer.run} has no checkpoint yet: starting from its settings")
            return
        trainer.resume()
        position = trainer.position
        if checkpoint.is_finished(position, trainer.settings):
            by_clock, length = trainer.settings.minutes, "--finetune" if trainer.settings.freeze else "--epochs"
            more = f"--minutes above {by_clock:g}" if by_clock else f"{length} above {position.epoch}"
            self.progress.note(f"{trainer.run} is finished, nothing is left to train: add {more} to train on")
            return
        self.progress.note(f"continuing {trainer.run} at epoch {position.epoch + 1}, step {position.step + 1}")

    def _store_changes(self, trainer: Trainer) -> None:
        """Store the settings that `--resume` changed. The result of a finished run gets another name."""
        run, settings = trainer.run, trainer.settings
        stored = checkpoint.load_settings(run)
        if settings.changes == stored.changes or not self.processes.is_main:
            return
        checkpoint.set_weights_aside(run, trainer.position)
        checkpoint.save_settings(run, settings)
        self.progress.note(f"changed: {describe_change(settings, stored)}")

    def _run(self, trainer: Trainer) -> bool:
        """Run the training loop with a progress bar and TensorBoard."""
        if trainer.settings.heads_only:
            return trainer.train()
        total = int(60 * trainer.settings.minutes) or trainer.settings.epochs * len(trainer.train_index)
        write = self.options.tensorboard and self.processes.is_main
        scalars = closing(TensorBoardWriter(trainer.run / FOLDER)) if write else nullcontext()
        with self.progress.track("training", total) as advance, scalars as writer:
            done, epoch_lines = 0, EpochLines(self.progress)

            def on_step(report: StepReport) -> None:
                nonlocal done
                advance(report.done - done, step_line(report), report.remaining_s)
                done = report.done
                if report.epoch_record is not None:
                    epoch_lines.add(report, report.epoch_record, last=trainer.progress >= 1)
                if writer is not None:
                    writer.add(report)

            try:
                return trainer.train(on_step, self.options.should_stop)
            except (NotFound, BadInput, Damaged) as error:  # an image that was readable when the run began
                if not has_progress(self.run):
                    raise
                hint = f"once it can be read again: mexit train --resume --out {shell_path(self.run)}"
                raise type(error)(f"{error}; {hint}") from None


def _changed(run: Path, given: Mapping[str, Any], data: str | None, preset: str | None) -> TrainSettings:
    """The settings of a stopped run with the given changes. Raises `UsageError` for one that cannot change."""
    stored = checkpoint.load_settings(run)
    named = {"data": data, "preset": preset, **given}
    robust = named.pop("robust", None)
    if robust is not None:
        if stored.attack == "none":
            raise UsageError(
                f"{run} trains on clean images, which --robust cannot change: begin another run with --out"
            )
        named["eps"] = robust
    return change_settings(run, stored, named, checkpoint.load_position(run))
