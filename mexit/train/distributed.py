"""Several processes that train one network, each on its share of every batch, started by `torchrun`.

    torchrun --nproc-per-node 2 -m mexit train ...

Gradients are added up over one flat buffer, each weighted by its process's share of the batch, so that an uneven
last batch counts right; so are the sums over a batch that some methods learn from. The network is not wrapped in
`DistributedDataParallel`: a step runs it many times, for the attack, on clean and on attacked images, and only the
last backward pass is to be shared. Because all other randomness goes by sample, two processes do what one does, up
to rounding, but for dropout, whose masks differ, and for BatchNorm, which normalises each share by itself; its
running statistics are averaged at every step.
"""

from __future__ import annotations

import datetime
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mexit.errors import MexitError, UsageError

PATIENCE = datetime.timedelta(hours=1)  # the others wait while the first one judges and writes
T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run; by default this one alone.

    Attributes:
        rank: of this process, from 0. The first one leads: it alone judges, writes and talks.
        size: how many.
        local: how many on this machine.
        device: of what they exchange, "cpu" or "cuda".
    """

    rank: int = 0
    size: int = 1
    local: int = 1
    device: str = "cpu"

    @property
    def leads(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of `count` rows are this process's."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def check(self, batch: int, count: int) -> None:
        """Refuse a batch size that leaves a process without images in the last of an epoch's `count` images."""
        smallest = min(batch, count % batch or batch)
        if smallest < self.size:
            raise UsageError(
                f"the last batch of an epoch has {smallest} of {count} images, fewer than the {self.size} "
                f"processes: choose another --batch than {batch}"
            )

    def sum(self, tensors: Sequence[Tensor], weight: float = 1.0) -> list[Tensor]:
        """The weighted sum over all processes of each tensor; all of them have one dtype.

        Args:
            tensors: not changed; the same shapes in every process.
            weight: of this process's tensors.
        """
        if self.size == 1:
            return list(tensors)
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors]) * weight
        self._sum(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for tensor, part in zip(tensors, parts, strict=True)]

    def average_gradients(self, network: nn.Module, weight: float) -> None:
        """Gradients, and running statistics of BatchNorm, become their weighted sums over all processes.

        Args:
            network: changed in place.
            weight: this process's share of the batch.
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
        """The weighted sum over all processes of each value; all have the same names."""
        if self.size == 1:
            return dict(values)
        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device) * weight
        self._sum(sums)
        return dict(zip(values, sums.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return self.average({"": float(flag)}, 1.0)[""] > 0

    def agree(self, value: T) -> T:
        """The first process's value."""
        if self.size == 1:
            return value
        values = [value]
        with _contact():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def _sum(self, tensor: Tensor) -> None:
        with _contact():
            dist.all_reduce(tensor)


ALONE = ProcessGroup()


@contextmanager
def joined(device: str) -> Iterator[ProcessGroup]:
    """The team that torchrun started this process for; alone without torchrun.

    Args:
        device: "auto", "cpu" or "cuda". Processes on GPUs take one each.

    Raises:
        UsageError: more processes on this machine than GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "MASTER_ADDR" not in os.environ or not dist.is_available():
        yield ALONE
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        if local > torch.cuda.device_count():
            raise UsageError(
                f"{local} processes on a machine with {torch.cuda.device_count()} GPUs: "
                f"torchrun --nproc-per-node {torch.cuda.device_count()}, or --device cpu"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # The optimiser imports it at its first step, and imported while a group exists it keeps that group alive:
    # gloo's threads then outlive the interpreter, and the process ends by SIGABRT now and then.
    importlib.import_module("torch._dynamo")
    with _contact():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield ProcessGroup(rank, size, local, "cuda" if cuda else "cpu")
    finally:
        dist.destroy_process_group()


@contextmanager
def _contact() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise MexitError(
            f"lost contact with the other processes ({reason}); the last checkpoint is intact"
        ) from None
