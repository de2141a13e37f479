"""What `mexit train` prints: a headline, one line per epoch on a pipe, and one line of 80 columns on a terminal."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from command_line import on_terminal, typed
from drawn_pictures import draw

from mexit.core.progress import duration

SMALL = ("--epochs", "3", "--method", "clean", "--batch", "256", "--threads", "1")
EPOCH = re.compile(r"epoch (\d)/3  loss \d+\.\d{3}  correct \d+\.\d%  selection \d+\.\d%  (\d+):\d\d left")


def test_a_pipe_gets_one_line_per_epoch() -> None:
    done = typed("train", *SMALL, "--out", "run")
    assert done.exit_code == 0
    epochs = [EPOCH.fullmatch(line) for line in done.stderr.splitlines() if line.startswith("epoch")]
    assert [found and found[1] for found in epochs] == ["1", "2", "3"]
    assert "training digits-cnn on digits with clean" in done.stderr
    assert "epoch" not in done.stdout.replace("epochs", "")


def test_an_attacked_run_shows_both_accuracies_on_a_pipe() -> None:
    done = typed("train", "--epochs", 1, "--steps", 1, "--fraction", 0.1, "--threads", 1, "--out", "run")
    assert re.search(r"attacked \d+\.\d%  selection \d+\.\d%  selection attacked \d+\.\d%  0:00 left", done.stderr)


@pytest.mark.long
def test_a_terminal_shows_a_bar_with_labelled_numbers_in_80_columns(tmp_path: Path) -> None:
    root = draw(tmp_path / "own")
    arguments = ("train", "--data", f"folder:{root}", *SMALL, "--out", "run")
    code, lines = on_terminal(*arguments, stdout=subprocess.DEVNULL)
    assert code == 0, lines
    assert max(map(len, lines)) <= 80
    bars = [line for line in lines if line.startswith("training ") and "%" in line]
    shown = re.compile(r" \d+% epoch \d/3  loss \d+\.\d{3}  correct \d+\.\d% \d+:\d\d left")
    assert any(shown.search(bar) for bar in bars), lines
    assert any(line.startswith("reading pictures") for line in lines)
    assert not any(EPOCH.fullmatch(line) for line in lines), "the bar shows them"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (272, "4:32"), (3599.4, "59:59"), (3872, "1:04:32")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
