"""`mexit train`: data, settings, loop; a run directory as the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mexit.core.files import parse_json, read_bytes
from mexit.data import catalog
from mexit.data.splits import Splits, split
from mexit.errors import NotFound, UsageError, missing_extra
from mexit.flows import plots
from mexit.flows.defaults import RUNS, free_name, newest, remember
from mexit.flows.progress import Progress, Silent

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
    """

    run: Path
    finished: bool
    settings: Mapping[str, Any]
    seconds: float
    records: tuple[Mapping[str, Any], ...]
    picture: Path | None


def train(
    *,
    data: str = "digits",
    preset: str | None = None,
    given: Mapping[str, Any] | None = None,
    data_dir: str | Path | None = None,
    out: Path | None = None,
    resume: bool = False,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train a network.

    Args:
        data: a name of `data.catalog.NAMES`, or `folder:PATH`.
        preset: a published schedule of that data set; None = its first.
        given: fields of `train.settings.TrainSettings` that override the preset.
        data_dir: where data sets lie; default `MEXIT_DATA`.
        out: the run directory; default a free name under `runs/`.
        resume: continue `out`, or the newest run, from its checkpoint with its stored settings.
        device, threads: "auto", "cpu" or "cuda"; threads of torch on the CPU.
        progress: who listens.
        should_stop: asked after every step.
    """
    progress = progress or Silent()
    _need_torch()
    from mexit.train import checkpoint, recipe
    from mexit.train.loop import Trainer
    from mexit.train.settings import resolve

    start = time.monotonic()
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, found {threads}")
    if resume:
        run = out or newest(RUNS, progress)
        settings = checkpoint.load_settings(run)
        data_set = catalog.load(settings.data, data_dir)
        splits = Splits.load(run / checkpoint.SPLITS)
        splits.check(data_set)
    else:
        data_set = catalog.load(data, data_dir)
        settings = resolve(data, preset, given or {})
        splits = split(data_set).thinned(data_set, settings.fraction, settings.omit_class)
        run = _new_run(out, f"{data_set.name.rpartition('/')[2].replace(':', '-')}-{settings.method}")
    recipe.use_threads(threads)
    recipe.keep_freed_memory()
    trainer = Trainer(run, settings, data_set, splits, recipe.choose(settings.recipe, device, settings.model))
    if resume:
        _continue(trainer, progress)
    else:
        checkpoint.begin(run, settings, splits)
    remember(RUNS, run)
    progress.note(_headline(trainer))
    finished = _watched(trainer, progress, should_stop)
    records = read_log(run)
    picture = run / checkpoint.CURVES if records and plots.available() else None
    if picture is not None:
        plots.curves(records, picture, f"{settings.method}, {settings.model}, {settings.data}")
    return TrainResult(run, finished, settings.to_json(), time.monotonic() - start, tuple(records), picture)


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
    settings, recipe = trainer.settings, trainer.recipe
    attack = trainer.attack.describe() if trainer.attack else "no attack"
    precision = "bf16" if recipe.bf16 else "fp32"
    return (
        f"training {settings.model} on {settings.data} with {settings.method}: {len(trainer.train_index)} images, "
        f"{settings.epochs} epochs, {attack}, {precision} on {recipe.device}, into {trainer.run}"
    )


def _watched(trainer: Any, progress: Progress, should_stop: Callable[[], bool]) -> bool:
    total = trainer.settings.epochs * len(trainer.train_index)
    with progress.track("training", total) as advance:
        done = 0

        def watch(report: Any) -> None:
            nonlocal done
            robust = report.attacked_accuracy
            detail = f"epoch {report.epoch}/{report.epochs}  loss {report.loss:.3f}"
            detail += f"  attacked {100 * robust:.1f}%" if robust is not None else ""
            advance(report.samples - done, detail)
            done = report.samples

        trainer.watch, trainer.should_stop = watch, should_stop
        return bool(trainer.train())


def _need_torch() -> None:
    try:
        import safetensors  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise missing_extra(error.name or "torch", "train", "Training a network") from None
