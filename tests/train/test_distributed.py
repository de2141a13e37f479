"""Two processes train what one trains, and say so once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import quiet
from safetensors.torch import load_file

from mexit.errors import UsageError
from mexit.flows.train import read_log, train
from mexit.train import checkpoint
from mexit.train.distributed import Team
from mexit.train.models import build
from mexit.train.objectives import build as build_objective
from mexit.train.settings import TrainSettings

PATIENCE_S = 200
# 283 images in batches of 140: the last one, of 3, is shared as 1 and 2.
GIVEN = {"method": "adversarial", "attack": "average", "steps": 2, "batch": 140, "recipe": "fp32", "fraction": 0.3}
FLAGS = [
    "--method", "adversarial", "--attack", "average", "--steps", "2", "--batch", "140", "--recipe", "fp32",
    "--fraction", "0.3", "--threads", "1",
]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@contextmanager
def torchrun(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Two processes, ended with their test."""
    process = subprocess.Popen(
        [*TORCHRUN, *arguments], env=quiet(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.terminate()  # torchrun passes it on
        process.communicate(timeout=PATIENCE_S)


def test_two_processes_end_in_the_weights_of_one_and_one_of_them_talks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torchrun("-m", "mexit", "train", *FLAGS, "--epochs", "1", "--out", "runs/two") as process:
        out, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    assert " ".join(said.split()).count("training digits-cnn on digits with adversarial: 283 images") == 1
    assert "2 processes" in " ".join(said.split())
    assert out.count("wrote runs/two") == 1

    monkeypatch.setitem(sys.modules, "matplotlib", None)  # no picture
    train(given=GIVEN | {"epochs": 1}, out=Path("runs/one"), threads=1)
    one, two = (load_file(f"runs/{name}/{checkpoint.WEIGHTS}") for name in ("one", "two"))
    fresh = build("digits-cnn", 10).state_dict()
    assert one.keys() == two.keys()
    for name, weights in one.items():
        # Rounding may turn a step of the attack on a pixel whose gradient is almost 0, hence not 1e-6.
        moved = (weights - fresh[name]).abs().max()
        assert (two[name] - weights).abs().max() < 1e-3 * moved
    for mine, theirs in zip(read_log(Path("runs/one")), read_log(Path("runs/two")), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
        assert theirs["clean accuracy"] == pytest.approx(mine["clean accuracy"], abs=0.01)


def test_a_signal_reaches_both_and_one_process_can_go_on() -> None:
    run = Path("runs/x")
    with torchrun("-m", "mexit", "train", *FLAGS, "--epochs", "100000", "--out", str(run)) as process:
        deadline = time.monotonic() + PATIENCE_S
        while not (run / checkpoint.LOG).exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    assert " ".join(said.split()).count("error: stopped; continue with: mexit train --resume --out runs/x") == 1
    logged = len(read_log(run))
    stops = iter([False, False, False, False, True])
    result = train(out=run, resume=True, threads=1, should_stop=lambda: next(stops))
    assert not result.finished
    assert len(result.records) > logged


TOGETHER = """
import os, torch
from pathlib import Path
from torch import nn
from mexit.errors import MexitError
from mexit.train.distributed import joined

torch.manual_seed(0)
network = nn.Sequential(nn.BatchNorm2d(2, affine=False), nn.Conv2d(2, 3, 1))
images = torch.rand(7, 2, 4, 4)
with joined("cpu") as team:
    assert (team.rank, team.size, team.local) == (int(os.environ["RANK"]), 2, 2)
    mine = images[team.share(7)]
    network[1](mine).square().mean().backward()
    network[0](mine)
    team.average_gradients(network, len(mine) / 7)
    found = [network[1].weight.grad.clone(), network[0].running_mean.clone()]
    alone = nn.BatchNorm2d(2, affine=False)
    alone(images)
    (expected,) = torch.autograd.grad(network[1](images).square().mean(), network[1].weight)
    torch.testing.assert_close(found, [expected, alone.running_mean])
    assert team.average({"a": float(team.rank), "b": 2.0}, len(mine) / 7) == {"a": 4 / 7, "b": 2.0}
    assert team.any(team.rank == 1) and not team.any(False)
    assert team.agree(f"of {team.rank}") == "of 0"
    if team.leads:
        try:
            team.any(False)
        except MexitError as error:
            print("all is well;", error)
    torch.optim.SGD(network.parameters(), 0.1).step()
threads = [Path(f"/proc/self/task/{name}/comm").read_text() for name in os.listdir("/proc/self/task")]
assert not any("gloo" in thread for thread in threads), threads  # they would outlive the interpreter
"""


def test_gradients_statistics_and_decisions_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    with torchrun(str(script)) as process:
        out, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    assert "all is well; lost contact with the other processes" in out


@pytest.mark.parametrize("count", [1, 7, 128])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_are_a_partition_in_order(count: int, size: int) -> None:
    rows = list(range(count))
    shares = [rows[Team(rank, size).share(count)] for rank in range(size)]
    assert [row for share in shares for row in share] == rows
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("settings", "count", "why"),
    [
        (TrainSettings(method="cmic"), 640, "cmic learns from whole batches .* in one process, without torchrun"),
        (TrainSettings(method="hdkd"), 640, "hdkd learns from whole batches"),
        (TrainSettings(method="adversarial", awp=0.01), 640, "--awp"),
        (TrainSettings(method="adversarial", batch=64), 641, "last batch of an epoch has 1 of 641 images"),
    ],
    ids=["statistics", "learned weights", "awp", "last batch"],
)
def test_what_needs_the_whole_batch_is_refused(settings: TrainSettings, count: int, why: str) -> None:
    objective = build_objective(settings.method, 3, settings.options)
    Team().check(objective, settings, count)
    with pytest.raises(UsageError, match=why):
        Team(0, 2).check(objective, settings, count)


@pytest.mark.parametrize("method", ["clean", "adversarial", "neo-kd"])
def test_methods_that_average_over_samples_may_be_shared(method: str) -> None:
    Team(0, 2).check(build_objective(method, 3, {}), TrainSettings(method=method), 640)
