"""Data-parallel training in several processes started by `torchrun`.

    torchrun --nproc-per-node 2 -m mexit train ...

Each process trains on its shard of every batch. Gradients, and the sums over a batch that some methods learn from,
are added over all processes, weighted by the size of the shard, so that an uneven last batch counts correctly. The
network is not wrapped in `DistributedDataParallel`, because a step runs it many times (for the attack, on clean and
on attacked images) and only the last backward pass must be shared. All other random numbers depend on the sample, so
two processes compute what one computes, up to rounding, with two exceptions: dropout masks differ, and BatchNorm
normalises each shard separately. The running statistics of BatchNorm are averaged at every step.
"""

from __future__ import annotations

import datetime
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mexit.errors import MexitError, UsageError

TIMEOUT = datetime.timedelta(hours=1)  # the other processes wait while the main one validates and writes
T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run; by default a single one.

    Attributes:
        rank: index of this process, from 0. Process 0 is the main one: it validates, writes and reports.
        size: number of processes.
        local_size: number of processes on this machine.
        device: device of the exchanged tensors, "cpu" or "cuda".
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        """Whether this process is the main one."""
        return self.rank == 0

    def shard(self, count: int) -> slice:
        """The slice of `count` rows that belongs to this process."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def check_batch(self, batch: int, count: int) -> None:
        """Check that every process gets at least one image of every batch.

        Args:
            batch: images per batch.
            count: images per epoch.

        Raises:
            UsageError: the last batch of an epoch has fewer images than there are processes.
        """
        smallest = min(batch, count % batch or batch)
        if smallest < self.size:
            raise UsageError(
                f"the last batch of an epoch has {smallest} of {count} images, fewer than the {self.size} "
                f"processes: choose another --batch than {batch}"
            )

    def sum(self, tensors: Sequence[Tensor], weight: float = 1.0) -> list[Tensor]:
        """The weighted sum of each tensor over all processes.

        Args:
            tensors: tensors of one dtype, with the same shapes in every process; they are not changed.
            weight: weight of this process.
        """
        if self.size == 1:
            return list(tensors)
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors]) * weight
        self._all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for tensor, part in zip(tensors, parts, strict=True)]

    def average_gradients(self, network: nn.Module, weight: float) -> None:
        """Replace gradients and running statistics of BatchNorm by their weighted sums over all processes.

        Args:
            network: network to change.
            weight: weight of this process: its fraction of the batch.
        """
        if self.size == 1:
            return
        tensors = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                tensors += [value for value in (layer.running_mean, layer.running_var) if value is not None]
        for tensor, total in zip(tensors, self.sum(tensors, weight), strict=True):
            tensor.copy_(total)

    def average(self, values: Mapping[str, float], weight: float) -> dict[str, float]:
        """The weighted sum of each value over all processes; every process has the same names."""
        if self.size == 1:
            return dict(values)
        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device) * weight
        self._all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return self.average({"": float(flag)}, 1.0)[""] > 0

    def broadcast(self, value: T) -> T:
        """The main process's value."""
        if self.size == 1:
            return value
        values = [value]
        with _lost_contact_is_an_error():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """Call `action` in the main process alone; its result, or its `MexitError`, reaches every process."""
        outcome: T | MexitError | None = None
        if self.is_main:
            try:
                outcome = action()
            except MexitError as error:
                outcome = error
        outcome = self.broadcast(outcome)
        if isinstance(outcome, MexitError):
            raise outcome
        return cast(T, outcome)

    def _all_reduce(self, tensor: Tensor) -> None:
        with _lost_contact_is_an_error():
            dist.all_reduce(tensor)


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def process_group(device: str) -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started; without torchrun, yield `SINGLE_PROCESS`.

    Args:
        device: "auto", "cpu" or "cuda". Each process on GPUs uses the GPU of its local rank.

    Raises:
        UsageError: this machine has fewer GPUs than processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "MASTER_ADDR" not in os.environ or not dist.is_available():
        yield SINGLE_PROCESS
        return
    rank, local_size = int(os.environ["RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        if local_size > torch.cuda.device_count():
            raise UsageError(
                f"{local_size} processes on a machine with {torch.cuda.device_count()} GPUs: "
                f"torchrun --nproc-per-node {torch.cuda.device_count()}, or --device cpu"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # The optimiser's first step imports torch._dynamo. Imported while a group exists, it keeps that group alive:
    # gloo's threads then outlive the interpreter, and the process sometimes ends by SIGABRT.
    importlib.import_module("torch._dynamo")
    with _lost_contact_is_an_error():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    try:
        yield ProcessGroup(rank, size, local_size, "cuda" if cuda else "cpu")
    finally:
        dist.destroy_process_group()


@contextmanager
def _lost_contact_is_an_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise MexitError(f"lost contact with the other processes ({reason}); the last checkpoint is intact") from None
