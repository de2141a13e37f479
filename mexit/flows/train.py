"""`mexit train`: data, settings, loop; a run directory as the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mexit.core.artifact_paths import RUNS, free_name, newest, remember
from mexit.core.atomic_io import parse_json, read_bytes
from mexit.core.progress import Progress, Silent
from mexit.data import registry
from mexit.data.dataset import DataSet
from mexit.data.splits import Splits, split
from mexit.errors import BadInput, Damaged, NotFound, UsageError, missing_extra
from mexit.evaluate import plots
from mexit.train.tensorboard import FOLDER, need_tensorboard, written_to

LOG = "log.jsonl"
MAX_LOG_BYTES = 1 << 30


@dataclass(frozen=True)
class TrainResult:
    """A run.

    Attributes:
        run: its directory.
        finished: False if it was stopped; `--resume` continues it.
        settings: as stored.
        seconds: spent in this call.
        records: one an epoch, as in `log.jsonl`.
        picture: the curves, or None without matplotlib.
        leads: False in all but the first of several processes; the first one reports.
    """

    run: Path
    finished: bool
    settings: Mapping[str, Any]
    seconds: float
    records: tuple[Mapping[str, Any], ...]
    picture: Path | None
    leads: bool = True


def train_model(
    *,
    data: str = "digits",
    preset: str | None = None,
    given: Mapping[str, Any] | None = None,
    data_dir: str | Path | None = None,
    out: Path | None = None,
    resume: bool = False,
    device: str = "auto",
    threads: int | None = None,
    workers: int | None = None,
    tensorboard: bool = False,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train a network.

    Args:
        data: a name of `data.registry.NAMES`, or `folder:PATH`.
        preset: a published schedule of that data set; None = its first.
        given: fields of `train.config.TrainSettings` that override the preset.
        data_dir: where data sets lie; default `MEXIT_DATA`.
        out: the run directory; default a free name under `runs/`.
        resume: continue `out`, or the newest run, from its checkpoint with its stored settings; teachers that it
            makes for itself and that are not finished come first.
        device, threads: "auto", "cpu" or "cuda"; threads of torch on the CPU.
        workers: threads that read and prepare images ahead; None = one a core for files, none for sets in memory.
            They change the speed only.
        tensorboard: write scalars under the run's `tensorboard` too.
        progress: who listens.
        should_stop: asked after every step.

    Started by torchrun, this is one of several processes that train together (`train.distributed`); only the first
    of them reports and writes.
    """
    _need_torch()
    from mexit.train import checkpoint, dataloader, distributed, precision
    from mexit.train.config import resolve

    start = time.monotonic()
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, found {threads}")
    if tensorboard:
        need_tensorboard()
    with distributed.joined(device) as team:
        progress = progress if progress and team.leads else Silent()
        if resume:
            run = out or newest(RUNS, progress)
            settings = checkpoint.load_settings(run)
            data_set = registry.load(settings.data, data_dir)
            splits = Splits.load(run / checkpoint.SPLITS)
            splits.check(data_set)
        else:
            data_set = registry.load(data, data_dir)
            settings = resolve(data, preset, given or {})
            splits = split(data_set).thinned(data_set, settings.fraction, settings.omit_class)
            name = f"{data_set.name.rpartition('/')[2].replace(':', '-')}-{settings.method}"
            run = Path(team.agree(str(_new_run(out, name))))
        precision.use_threads(threads, team.local)
        precision.keep_freed_memory()
        ahead = dataloader.workers_for(data_set, workers)
        work = _Work(run, data_set, splits, device, ahead, progress, should_stop, team, tensorboard)
        finished, settings = _trained_after_its_teachers(settings, work)
        records = read_log(run)
        picture = run / checkpoint.CURVES if records and team.leads and plots.available() else None
        if picture is not None:
            plots.training_curves(records, picture, f"{settings.method}, {settings.model}, {settings.data}")
        seconds = time.monotonic() - start
        return TrainResult(run, finished, settings.to_json(), seconds, tuple(records), picture, team.leads)


@dataclass(frozen=True)
class _Work:
    """What a run and the teachers it makes for itself have in common; `run` is the one that was asked for."""

    run: Path
    data_set: DataSet
    splits: Splits
    device: str
    workers: int
    progress: Progress
    should_stop: Callable[[], bool]
    team: Any
    tensorboard: bool


def _trained_after_its_teachers(settings: Any, work: _Work) -> tuple[bool, Any]:
    """Train the run that was asked for; whether it is finished, and its settings with the teachers it made."""
    from mexit.train import checkpoint
    from mexit.train.own_teachers import own_teachers

    teachers = own_teachers(work.run, settings)
    if teachers:
        _begin(work.run, settings, work)
        todo = {teacher: its for teacher, its in teachers.items() if not (teacher / checkpoint.WEIGHTS).exists()}
        if not all(_trained(teacher, its_settings, work) for teacher, its_settings in todo.items()):
            return False, settings
        settings = replace(settings, teachers=tuple(str(teacher) for teacher in teachers))
        _begin(work.run, settings, work)
    return _trained(work.run, settings, work), settings


def _begin(run: Path, settings: Any, work: _Work) -> None:
    from mexit.train import checkpoint

    if work.team.leads:
        checkpoint.begin(run, settings, work.splits)


def _trained(run: Path, settings: Any, work: _Work) -> bool:
    """Train a run, from its checkpoint if it has one; False if it was stopped before its end."""
    from mexit.train import checkpoint, precision
    from mexit.train.trainer import Trainer

    how = precision.choose(settings.precision, work.device, settings.model)
    trainer = Trainer(run, settings, work.data_set, work.splits, how, workers=work.workers, team=work.team)
    if work.team.agree((run / checkpoint.SETTINGS).exists()):
        _continue(trainer, work.progress)
    else:
        _begin(run, settings, work)
    if work.team.leads:
        remember(RUNS, work.run)
    work.progress.note(_headline(trainer))
    return _watched(trainer, work)


def read_log(run: Path) -> list[dict[str, Any]]:
    """The epoch records of a run."""
    try:
        content = read_bytes(run / LOG, "log", MAX_LOG_BYTES)
    except NotFound:
        return []
    return [parse_json(line, run / LOG, "log") for line in content.splitlines()]


def _new_run(out: Path | None, name: str) -> Path:
    if out is None:
        return free_name(RUNS, name)
    if (out / "settings.json").exists():
        raise UsageError(
            f"run {out} exists already: continue it with --resume --out {out}, or choose another --out"
        )
    return out


def _continue(trainer: Any, progress: Progress) -> None:
    from mexit.train import checkpoint

    if not (trainer.run / checkpoint.CHECKPOINT).exists():
        progress.note(f"{trainer.run} has no checkpoint yet: starting from its settings")
        return
    trainer.resume()
    place = trainer.progress
    progress.note(f"continuing {trainer.run} at epoch {place.epoch + 1}, step {place.step + 1}")


def _headline(trainer: Any) -> str:
    settings, chosen, processes = trainer.settings, trainer.recipe, trainer.team.size
    attack = trainer.attack.describe() if trainer.attack else "no attack"
    precision = "bf16" if chosen.bf16 else "fp32"
    return (
        f"training {settings.model} on {settings.data} with {settings.method}: {len(trainer.train_index)} images, "
        f"{settings.epochs} epochs, {attack}, {precision} on {chosen.device}, "
        f"{f'{processes} processes, ' if processes > 1 else ''}into {trainer.run}"
    )


def _watched(trainer: Any, work: _Work) -> bool:
    total = trainer.settings.epochs * len(trainer.train_index)
    folder = trainer.run / FOLDER if work.tensorboard and work.team.leads else None
    with work.progress.track("training", total) as advance, written_to(folder) as add:
        done = 0

        def watch(report: Any) -> None:
            nonlocal done
            robust = report.attacked_accuracy
            detail = f"epoch {report.epoch}/{report.epochs}  loss {report.loss:.3f}"
            detail += f"  attacked {100 * robust:.1f}%" if robust is not None else ""
            advance(report.samples - done, detail)
            done = report.samples
            add(report)

        trainer.watch, trainer.should_stop = watch, work.should_stop
        try:
            return bool(trainer.train())
        except (NotFound, BadInput, Damaged) as error:  # an image that was there when the run began
            hint = f"once it can be read again: mexit train --resume --out {work.run}"
            raise type(error)(f"{error}; {hint}") from None


def _need_torch() -> None:
    try:
        import safetensors  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise missing_extra(error.name or "torch", "train", "Training a network") from None
