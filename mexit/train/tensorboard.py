"""`--tensorboard`: a run's figures as TensorBoard scalars, beside the run's own log.

step/loss, step/attacked accuracy     means of the epoch so far, over samples done; at most one a second
epoch/NAME, epoch/NAME/exit K         everything in the run's log, over epochs
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mexit.errors import MexitError, missing_extra

FOLDER = "tensorboard"
EVERY_S = 1.0


def need_tensorboard() -> Any:
    """torch's writer of event files. Raises `MissingExtra` where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise missing_extra("tensorboard", "train", "--tensorboard") from None
    return SummaryWriter


class Scalars:
    """Writes to `folder`; a resumed run adds a file of its own there.

    Raises:
        MissingExtra: TensorBoard is not installed.
        MexitError: a write failed.
    """

    def __init__(self, folder: Path) -> None:
        writer = need_tensorboard()
        self._folder, self._next = folder, 0.0
        with self._writing():
            self._writer = writer(str(folder))

    def add(self, report: Any) -> None:
        """Take in a `train.trainer.Report`."""
        with self._writing():
            if time.monotonic() >= self._next:
                self._next = time.monotonic() + EVERY_S
                self._writer.add_scalar("step/loss", report.loss, report.samples)
                if report.attacked_accuracy is not None:
                    self._writer.add_scalar("step/attacked accuracy", report.attacked_accuracy, report.samples)
            if report.epoch_record is not None:
                for name, value in flat(report.epoch_record, "epoch"):
                    self._writer.add_scalar(name, value, report.epoch_record["epoch"])
                self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        with self._writing():
            self._writer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MexitError(
                f"could not write {self._folder}: {error.strerror}; the last checkpoint is intact"
            ) from error


@contextmanager
def written_to(folder: Path | None) -> Iterator[Callable[[Any], None]]:
    """Yields what takes in each `train.trainer.Report`; without a folder nothing is written."""
    if folder is None:
        yield lambda _: None
        return
    scalars = Scalars(folder)
    try:
        yield scalars.add
    finally:
        scalars.close()


def flat(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """A log line as names and numbers; a list has one value an exit."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}/{name}")
        elif isinstance(value, list):
            yield from ((f"{prefix}/{name}/exit {k}", float(one)) for k, one in enumerate(value, start=1))
        elif name != "epoch":
            yield f"{prefix}/{name}", float(value)
