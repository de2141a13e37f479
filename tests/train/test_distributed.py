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
import torch
import whole_batches
from command_line import quiet
from safetensors.torch import load_file

from mexit.errors import UsageError
from mexit.flows.train import read_log, train_model
from mexit.models import build_model
from mexit.train import checkpoint
from mexit.train.distributed import ProcessGroup

PATIENCE_S = 200
# 283 images in batches of 140: the last one, of 3, is shared as 1 and 2.
GIVEN = {
    "method": "adversarial",
    "attack": "average",
    "steps": 2,
    "batch": 140,
    "precision": "fp32",
    "fraction": 0.3,
}
FLAGS = [
    "--method", "adversarial", "--attack", "average", "--steps", "2", "--batch", "140", "--precision", "fp32",
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
    train_model(given=GIVEN | {"epochs": 1}, out=Path("runs/one"), threads=1)
    one, two = (load_file(f"runs/{name}/{checkpoint.WEIGHTS}") for name in ("one", "two"))
    fresh = build_model("digits-cnn", 10).state_dict()
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
    result = train_model(out=run, resume=True, threads=1, should_stop=lambda: next(stops))
    assert not result.finished
    assert len(result.records) > logged


TOGETHER = """
import os, torch
from pathlib import Path
from torch import nn
from mexit.errors import MexitError
from mexit.train.distributed import joined
from mexit.train.methods import build_method
from mexit.train.methods.base import Batch, Outputs, Setup, StepInfo
from mexit.attacks.rng import CounterRNG

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
    for confidence, temperature in ((0.9, 1.05), (0.7, 1.0)):  # with the other's 0.3 on average above 0.5, or not
        skd = build_method("skd", {})
        skd.setup(Setup(3, 10, process_group=team))
        largest = torch.tensor(confidence if team.leads else 0.3)
        probabilities = torch.full((3, len(mine), 10), float((1 - largest) / 9))
        probabilities[..., 0] = largest
        batch = Batch(None, mine, torch.zeros(len(mine)), torch.arange(len(mine)), None, CounterRNG(0, 0))
        skd.after_step(Outputs(batch, probabilities.log(), step=StepInfo(share=len(mine) / 7)))
        assert skd.current_temperature == temperature, (team.rank, confidence, skd.current_temperature)
    partitions = []
    for redraw in ("batch", "fixed"):
        neo_kd = build_method("neo-kd", {"redraw": redraw})
        rows = torch.arange(7)[team.share(7)]
        batch = Batch(None, mine, rows % 10, rows, None, CounterRNG(0, 0))
        groups = neo_kd.class_groups(Outputs(batch, torch.zeros(3, len(rows), 10), step=StepInfo(number=5)))
        assert (groups == groups[:, :1]).all()
        partitions.append(groups[:, 0].double())
    for mean, own in zip(team.sum(partitions, 0.5), partitions):
        assert torch.equal(mean, own), "the processes drew different groups"
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
    shares = [rows[ProcessGroup(rank, size).share(count)] for rank in range(size)]
    assert [row for share in shares for row in share] == rows
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_batch_with_fewer_images_than_processes_is_refused() -> None:
    ProcessGroup().check(64, 641)
    ProcessGroup(0, 2).check(64, 642)
    with pytest.raises(UsageError, match="last batch of an epoch has 1 of 641 images"):
        ProcessGroup(0, 2).check(64, 641)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what they ended in."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with torchrun(whole_batches.__file__) as process:
            _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    return folder


@pytest.mark.parametrize("name", whole_batches.RUNS)
def test_what_is_learned_from_whole_batches_is_learned_from_shares(name: str, shared: Path) -> None:
    fresh, one = whole_batches.run(name)
    two, other = (load_file(shared / f"{name}-{rank}.safetensors") for rank in range(2))
    for key, value in one.items():
        if key in fresh:
            moved = (value - fresh[key]).abs().max()
            assert (two[key] - value).abs().max() < 1e-4 * moved, key
        else:
            torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other[key], two[key], rtol=1e-6, atol=1e-7)
