"""The lines about a training run: its last step, and each epoch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mexit.core.progress import Progress, duration

if TYPE_CHECKING:
    from mexit.train.step_report import StepReport

FIRST = 10  # epochs that always have a line
APART_S = 5.0  # seconds between lines of later epochs, at least


class EpochLines:
    """Reports one line per epoch. From epoch `FIRST` on, epochs that end soon after the last line are left out."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._shown, self._shown_s = 0, 0.0

    def add(self, report: StepReport, record: Mapping[str, Any], *, last: bool) -> None:
        """Report a finished epoch with its log record; `last` says whether the run ends with it."""
        now_s = time.perf_counter()  # not the clock of the schedule
        if last or self._shown < FIRST or now_s - self._shown_s >= APART_S:
            self._shown, self._shown_s = self._shown + 1, now_s
            self._progress.log(_epoch_line(report, record))


def step_line(report: StepReport) -> str:
    """The labelled numbers beside the progress bar; accuracies are means over exits on the training images."""
    attacked = report.attacked_accuracy
    shown = f"correct {100 * report.clean_accuracy:.1f}%" if attacked is None else f"attacked {100 * attacked:.1f}%"
    return f"epoch {report.epoch}/{report.epochs}  loss {report.loss:.3f}  {shown}"


def _epoch_line(report: StepReport, record: Mapping[str, Any]) -> str:
    """One line about a finished epoch; the accuracy on the selection split is that of the last exit."""
    line = step_line(report)
    for name, accuracy in record.get("selection", {}).items():
        line += f"  selection{'' if name == 'clean' else ' attacked'} {100 * accuracy[-1]:.1f}%"
    return f"{line}  {duration(report.remaining_s)} left"
