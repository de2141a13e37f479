"""Writes the metrics of a run as TensorBoard scalars, for `--tensorboard`.

step/loss, step/attacked accuracy     means of the epoch so far, against samples; at most once a second
epoch/NAME, epoch/NAME/exit K         every entry of the run's log, against epochs
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mexit.errors import MexitError, requires_extra
from mexit.train.step_report import StepReport

FOLDER = "tensorboard"
INTERVAL_S = 1.0


def require_tensorboard() -> None:
    """Raise `MissingExtra` if TensorBoard is not installed."""
    with requires_extra("train", "--tensorboard"):
        from torch.utils import tensorboard  # noqa: F401  imports the optional package tensorboard


class TensorBoardWriter:
    """Writes event files. A resumed run adds a file of its own.

    Args:
        folder: directory of the event files.

    Raises:
        MissingExtra: TensorBoard is not installed.
        MexitError: a write failed.
    """

    def __init__(self, folder: Path) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter  # imports the optional package tensorboard

        self._folder, self._next_s = folder, 0.0
        with self._write_errors():
            self._writer = SummaryWriter(str(folder))

    def add(self, report: StepReport) -> None:
        """Write the metrics of a step, and of its epoch if the step ends one."""
        with self._write_errors():
            if time.monotonic() >= self._next_s:
                self._next_s = time.monotonic() + INTERVAL_S
                self._writer.add_scalar("step/loss", report.loss, report.samples)
                if report.attacked_accuracy is not None:
                    self._writer.add_scalar("step/attacked accuracy", report.attacked_accuracy, report.samples)
            if report.epoch_record is not None:
                for name, value in flatten(report.epoch_record, "epoch"):
                    self._writer.add_scalar(name, value, report.epoch_record["epoch"])
                self._writer.flush()

    def close(self) -> None:
        """Write buffered values and close the file."""
        with self._write_errors():
            self._writer.close()

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MexitError(
                f"could not write {self._folder}: {error.strerror}; the last checkpoint is intact"
            ) from error


def flatten(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """Yield the names and numbers of a log record; a list holds one value per exit."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}/{name}")
        elif isinstance(value, list):
            yield from ((f"{prefix}/{name}/exit {k}", float(number)) for k, number in enumerate(value, start=1))
        elif name != "epoch":
            yield f"{prefix}/{name}", float(value)
