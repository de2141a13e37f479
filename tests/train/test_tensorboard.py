"""`--tensorboard` writes the metrics of the log."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import program, typed

from mexit.train.checkpoint import read_log

FLAGS = ("--method", "adversarial", "--epochs", "2", "--batch", "943", "--steps", "1", "--threads", "1")


def test_the_scalars_are_those_of_the_log() -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert typed("train", *FLAGS, "--tensorboard", "--out", "runs/x").exit_code == 0
    events = EventAccumulator("runs/x/tensorboard")
    events.Reload()
    log = read_log(Path("runs/x"))
    for tag, values in {
        "epoch/loss": [record["loss"] for record in log],
        "epoch/lr": [record["lr"] for record in log],
        "epoch/selection/attacked/exit 3": [record["selection"]["attacked"][2] for record in log],
    }.items():
        scalars = events.Scalars(tag)
        assert [event.step for event in scalars] == [1, 2]
        assert [event.value for event in scalars] == pytest.approx(values, rel=1e-5)
    first = events.Scalars("step/loss")[0]
    assert first.step == 943
    assert first.value == pytest.approx(log[0]["loss"], rel=1e-5)
    assert events.Scalars("step/attacked accuracy")[0].step == 943


def test_without_the_flag_nothing_is_written() -> None:
    assert typed("train", *FLAGS, "--out", "runs/x").exit_code == 0
    assert not Path("runs/x/tensorboard").exists()


def test_without_the_package_no_run_is_created() -> None:
    hidden = "import sys; sys.modules['tensorboard'] = None"
    done = program("train", *FLAGS, "--tensorboard", "--out", "runs/x", before=hidden)
    assert done.returncode == 4
    assert "pip install 'mexit[train]'" in done.stderr
    assert not Path("runs/x").exists()
