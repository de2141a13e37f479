"""The lines of a training run on a pipe: one per epoch, fewer where epochs are short."""

from __future__ import annotations

import pytest

from mexit.core.progress import Silent
from mexit.flows import epoch_lines
from mexit.flows.epoch_lines import FIRST, EpochLines
from mexit.train.step_report import StepReport

EPOCHS = FIRST + 5


class Lines(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[int]:
    """The epochs that have a line, where lines of later epochs are `request.param` seconds apart."""
    monkeypatch.setattr(epoch_lines, "APART_S", request.param)
    progress = Lines()
    lines = EpochLines(progress)
    for epoch in range(1, EPOCHS + 1):
        report = StepReport(epoch, EPOCHS, 0, 0, 0, 0.0, 0.5, 0.9, None)
        lines.add(report, {"selection": {"clean": [0.1, 0.8]}}, last=epoch == EPOCHS)
    assert all("loss 0.500  correct 90.0%  selection 80.0%  0:00 left" in line for line in progress.lines)
    return [int(line.split()[1].partition("/")[0]) for line in progress.lines]


@pytest.mark.parametrize("shown", [3600.0], indirect=True)
def test_short_epochs_after_the_first_ones_have_no_line_but_the_last_has(shown: list[int]) -> None:
    assert shown == [*range(1, FIRST + 1), EPOCHS]


@pytest.mark.parametrize("shown", [0.0], indirect=True)
def test_every_long_epoch_has_a_line(shown: list[int]) -> None:
    assert shown == list(range(1, EPOCHS + 1))
