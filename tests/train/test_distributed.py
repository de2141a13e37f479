"""Two processes train the same weights as one; only the main process reports."""

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
from mexit.flows.train import TrainOptions, train_model
from mexit.models import build_model
from mexit.train import checkpoint
from mexit.train.checkpoint import read_log
from mexit.train.distributed import ProcessGroup

pytestmark = pytest.mark.slow

TIMEOUT_S = 200
# 283 images in batches of 140: the last batch has 3 images, in shards of 1 and 2.
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
    """Start two processes; they end with the test."""
    process = subprocess.Popen(
        [*TORCHRUN, *arguments], env=quiet(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.terminate()  # torchrun passes it on
        process.communicate(timeout=TIMEOUT_S)


def test_two_processes_train_the_weights_of_one_and_only_the_main_one_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torchrun("-m", "mexit", "train", *FLAGS, "--epochs", "1", "--out", "runs/two") as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    assert " ".join(err.split()).count("training digits-cnn on digits with adversarial: 283 images") == 1
    assert "2 processes" in " ".join(err.split())
    assert out.count("wrote runs/two") == 1

    monkeypatch.setitem(sys.modules, "matplotlib", None)  # no picture
    train_model(settings=GIVEN | {"epochs": 1}, out=Path("runs/one"), options=TrainOptions(threads=1))
    one, two = (load_file(f"runs/{name}/{checkpoint.WEIGHTS}") for name in ("one", "two"))
    fresh = build_model("digits-cnn", 10).state_dict()
    assert one.keys() == two.keys()
    for name, weights in one.items():
        # Rounding may flip the sign of a gradient near 0 in the attack, hence not 1e-6.
        moved = (weights - fresh[name]).abs().max()
        assert (two[name] - weights).abs().max() < 1e-3 * moved
    for mine, theirs in zip(read_log(Path("runs/one")), read_log(Path("runs/two")), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
        assert theirs["clean accuracy"] == pytest.approx(mine["clean accuracy"], abs=0.01)


@pytest.mark.long
def test_a_signal_stops_both_processes_and_one_process_can_resume() -> None:
    run = Path("runs/x")
    with torchrun("-m", "mexit", "train", *FLAGS, "--epochs", "100000", "--out", str(run)) as process:
        deadline = time.monotonic() + TIMEOUT_S
        while not (run / checkpoint.LOG).exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0
    assert " ".join(err.split()).count("error: stopped; continue with: mexit train --resume --out runs/x") == 1
    logged = len(read_log(run))
    stops = iter([False, False, False, False, True])
    result = train_model(out=run, resume=True, options=TrainOptions(threads=1, should_stop=lambda: next(stops)))
    assert not result.finished
    assert len(result.records) > logged


TWO_PROCESSES = """
import os, torch
from pathlib import Path
from torch import nn
from mexit.errors import MexitError
from mexit.train.distributed import process_group
from mexit.train.methods import build_method
from mexit.train.methods.base import Batch, Outputs, Setup, StepInfo
from mexit.attacks.rng import CounterRNG

torch.manual_seed(0)
network = nn.Sequential(nn.BatchNorm2d(2, affine=False), nn.Conv2d(2, 3, 1))
images = torch.rand(7, 2, 4, 4)
with process_group("cpu") as processes:
    assert (processes.rank, processes.size, processes.local_size) == (int(os.environ["RANK"]), 2, 2)
    shard = images[processes.shard(7)]
    network[1](shard).square().mean().backward()
    network[0](shard)
    processes.average_gradients(network, len(shard) / 7)
    averaged = [network[1].weight.grad.clone(), network[0].running_mean.clone()]
    single = nn.BatchNorm2d(2, affine=False)
    single(images)
    (expected,) = torch.autograd.grad(network[1](images).square().mean(), network[1].weight)
    torch.testing.assert_close(averaged, [expected, single.running_mean])
    assert processes.average({"a": float(processes.rank), "b": 2.0}, len(shard) / 7) == {"a": 4 / 7, "b": 2.0}
    assert processes.any(processes.rank == 1) and not processes.any(False)
    assert processes.broadcast(f"of {processes.rank}") == "of 0"
    for confidence, temperature in ((0.9, 1.05), (0.7, 1.0)):  # mean with the other's 0.3: 0.6, 0.5
        skd = build_method("skd", {})
        skd.setup(Setup(3, 10, process_group=processes))
        largest = torch.tensor(confidence if processes.is_main else 0.3)
        probabilities = torch.full((3, len(shard), 10), float((1 - largest) / 9))
        probabilities[..., 0] = largest
        batch = Batch(None, shard, torch.zeros(len(shard)), torch.arange(len(shard)), None, CounterRNG(0, 0))
        skd.after_step(Outputs(batch, probabilities.log(), step=StepInfo(share=len(shard) / 7)))
        assert skd.current_temperature == temperature, (processes.rank, confidence, skd.current_temperature)
    partitions = []
    for redraw in ("batch", "fixed"):
        neo_kd = build_method("neo-kd", {"redraw": redraw})
        rows = torch.arange(7)[processes.shard(7)]
        batch = Batch(None, shard, rows % 10, rows, None, CounterRNG(0, 0))
        groups = neo_kd.class_groups(Outputs(batch, torch.zeros(3, len(rows), 10), step=StepInfo(number=5)))
        assert (groups == groups[:, :1]).all()
        partitions.append(groups[:, 0].double())
    for mean, own in zip(processes.sum(partitions, 0.5), partitions):
        assert torch.equal(mean, own), "the processes drew different groups"
    if processes.is_main:
        try:
            processes.any(False)
        except MexitError as error:
            print("passed;", error)
    torch.optim.SGD(network.parameters(), 0.1).step()
threads = [Path(f"/proc/self/task/{name}/comm").read_text() for name in os.listdir("/proc/self/task")]
assert not any("gloo" in thread for thread in threads), threads  # such threads outlive the interpreter
"""


def test_gradients_statistics_and_decisions_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    with torchrun(str(script)) as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    assert "passed; lost contact with the other processes" in out


@pytest.mark.parametrize("count", [1, 7, 128])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shards_are_a_partition_in_order(count: int, size: int) -> None:
    rows = list(range(count))
    shards = [rows[ProcessGroup(rank, size).shard(count)] for rank in range(size)]
    assert [row for shard in shards for row in shard] == rows
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_a_batch_with_fewer_images_than_processes_is_refused() -> None:
    ProcessGroup().check_batch(64, 641)
    ProcessGroup(0, 2).check_batch(64, 642)
    with pytest.raises(UsageError, match="last batch of an epoch has 1 of 641 images"):
        ProcessGroup(0, 2).check_batch(64, 641)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the weights that two processes trained."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with torchrun(whole_batches.__file__) as process:
            _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    return folder


@pytest.mark.parametrize("name", whole_batches.RUNS)
def test_methods_that_use_whole_batch_sums_learn_the_same_from_shards(name: str, shared: Path) -> None:
    fresh, one = whole_batches.run(name)
    two, other = (load_file(shared / f"{name}-{rank}.safetensors") for rank in range(2))
    for key, value in one.items():
        if key in fresh:
            moved = (value - fresh[key]).abs().max()
            assert (two[key] - value).abs().max() < 1e-4 * moved, key
        else:
            torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other[key], two[key], rtol=1e-6, atol=1e-7)
