"""The directory of a run while it is trained: created under a free name, locked, removed if nothing came of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from mexit.core.artifact_paths import RUNS, create_free, forget, remember
from mexit.core.directory_lock import directory_lock
from mexit.core.printable import shell_path
from mexit.errors import MexitError, UsageError
from mexit.train import checkpoint
from mexit.train.tensorboard import FOLDER


@contextmanager
def existing_run(run: Path) -> Iterator[Path]:
    """Lock a run to continue it.

    Raises:
        NotFound, Damaged: the run does not exist, or its settings are damaged.
        UsageError: another process trains it.
    """
    checkpoint.load_settings(run)
    with _locked(run):
        yield run


@contextmanager
def new_run(out: Path | None, name: str) -> Iterator[Path]:
    """Create and lock the directory of a new run, and make it the newest.

    If the block ends with an exception before the first checkpoint, the files of the run are removed, so that its name
    is free again.

    Args:
        out: the directory; it may exist if it holds no run. None = a free name in `runs/`.
        name: beginning of the free name.

    Raises:
        UsageError: `out` holds a run, or another process trains it.
        MexitError: the directory cannot be written.
    """
    run, created = (create_free(RUNS, name), True) if out is None else (out, _create(out))
    try:
        with _locked(run):
            if (run / checkpoint.SETTINGS).exists():
                raise UsageError(
                    f"run {run} exists already: continue it with --resume --out {shell_path(run)}, or choose another "
                    "--out"
                )
            previous = remember(RUNS, run)
            try:
                yield run
            except BaseException:
                if not has_progress(run):
                    _discard(run)
                    forget(RUNS, run, previous)
                raise
    except BaseException:
        if created:
            with suppress(OSError):  # it is not empty
                run.rmdir()
        raise


def has_progress(run: Path) -> bool:
    """Whether the run, or a teacher that it trains for itself, has a checkpoint or weights."""
    return any(any(run.rglob(name)) for name in (checkpoint.CHECKPOINT, checkpoint.WEIGHTS))


def _locked(run: Path) -> AbstractContextManager[None]:
    return directory_lock(run, f"run {run} is being trained")


def _create(run: Path) -> bool:
    """Make the directory; False if it exists."""
    existed = run.is_dir()
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MexitError(f"could not create {run}: {error.strerror}") from None
    return not existed


def _discard(run: Path) -> None:
    """Remove the files of a run without a checkpoint, and the runs of its teachers."""
    for teacher in run.glob(f"teacher-*/{checkpoint.SETTINGS}"):
        _discard(teacher.parent)
        with suppress(OSError):
            teacher.parent.rmdir()
    for name in (checkpoint.SETTINGS, checkpoint.SPLITS, checkpoint.LOG):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / FOLDER, ignore_errors=True)
