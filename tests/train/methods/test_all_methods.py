"""Every method lowers the loss on real digits, and a run stopped and resumed many times ends in the same weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mexit.attacks.losses import exit_cross_entropy
from mexit.data import digits
from mexit.data.splits import Splits
from mexit.flows.train import TrainOptions, TrainResult, train_model
from mexit.models import MultiExit, build_model, model_spec
from mexit.train import checkpoint
from mexit.train.checkpoint import read_log
from mexit.train.methods import METHODS

pytestmark = pytest.mark.slow

TINY = {
    "epochs": 2, "lr": 0.05, "eps": 0.05, "steps": 2, "step": 0.05, "fraction": 0.2, "batch": 16, "precision": "fp32",
    "selection_steps": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread and no pictures."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def loss(model: MultiExit, run: Path) -> float:
    """Mean cross-entropy over exits on the run's training images."""
    data, index = digits.load(), Splits.load(run / checkpoint.SPLITS).part("train")
    with torch.no_grad():
        logits = model(torch.from_numpy(data.batch(index, model_spec("digits-cnn").input)))
    return float(exit_cross_entropy(logits, torch.from_numpy(data.labels[index])).mean())


def train_with_stops(run: Path, every: int, **given: object) -> int:
    """Train a run that is stopped after every `every` steps and resumed. Returns the number of stops."""
    result: TrainResult | None = None
    stops = -1
    while result is None or not result.finished:
        left = iter(range(every - 1, -1, -1))
        result = train_model(
            settings=given,
            out=run,
            resume=result is not None,
            options=TrainOptions(threads=1, should_stop=lambda left=left: not next(left)),
        )
        stops += 1
    return stops


def same_bits(one: Path, other: Path) -> bool:
    first, second = load_file(one / checkpoint.WEIGHTS), load_file(other / checkpoint.WEIGHTS)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_lowers_the_loss_and_resumes_to_the_same_weights(method: str, tmp_path: Path) -> None:
    whole = train_model(settings=TINY | {"method": method}, out=tmp_path / "whole", options=TrainOptions(threads=1)).run
    torch.manual_seed(0)
    fresh = build_model("digits-cnn", 10)
    assert loss(checkpoint.load_model(whole)[0], whole) < 0.97 * loss(fresh, whole)
    assert train_with_stops(tmp_path / "x", 7, **TINY, method=method) >= 3
    assert same_bits(whole, tmp_path / "x")
    assert read_log(whole) == read_log(tmp_path / "x")


def test_a_pass_over_the_data_draws_the_same_dropout_in_a_resumed_run(tmp_path: Path) -> None:
    """Stopped at the last step of the epoch before the pass, so that the pass is the first thing it does."""
    given = {
        "method": "mcmi",
        "model": "small-cnn",
        "epochs": 2,
        "fraction": 0.05,
        "batch": 16,
        "precision": "fp32",
    }
    train_model(settings=given, out=tmp_path / "whole", options=TrainOptions(threads=1))
    assert train_with_stops(tmp_path / "x", 3, **given) == 2
    assert same_bits(tmp_path / "whole", tmp_path / "x")
