"""The device, dtype and memory format of training.

On a device with native bfloat16, training runs under autocast in channels_last, and attacks in eval mode run on a
fused bfloat16 copy of the network (`fused_eval_copy`). The setting "fp32" selects the plain path. Training attacks in
bfloat16 give the same robustness as in float32; every reported robustness is computed in float32.
`benchmarks/training_speed.py` measures a step against plain float32.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from mexit.core.resource_limits import cpu_info, read_limits
from mexit.models.device import resolve_device
from mexit.models.msdnet import make_gradients_contiguous
from mexit.models.multi_exit import MultiExit
from mexit.train.fused_eval_copy import FusedEvalCopy

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


@dataclass(frozen=True)
class Precision:
    """A device and its arithmetic.

    Attributes:
        device: "cpu" or "cuda".
        bf16: whether forward passes run under autocast to bfloat16.
        channels_last: whether images and weights are in the channels_last memory format.
    """

    device: str
    bf16: bool
    channels_last: bool

    def autocast(self) -> AbstractContextManager[object]:
        """The context for forward passes in training."""
        # A CUDA graph that holds a cached conversion of the weights would use those of the first step for ever.
        cache = self.device == "cpu"
        return torch.autocast(self.device, torch.bfloat16, cache_enabled=cache) if self.bf16 else nullcontext()

    def prepare(self, model: MultiExit) -> MultiExit:
        """Move the model to the device and memory format."""
        model = model.to(self.device)
        if self.bf16:
            make_gradients_contiguous(model)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model  # type: ignore[call-overload]

    def attack_copy(self, model: MultiExit) -> FusedEvalCopy | None:
        """A copy of `model` for attacks in eval mode, or None where the copy is not faster."""
        return FusedEvalCopy(model) if self.bf16 else None

    def to_device(self, images: Tensor) -> Tensor:
        """Move images (B, C, H, W) to the device and memory format."""
        images = images.to(self.device, non_blocking=True)
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images


def select_precision(setting: str, device: str) -> Precision:
    """Select the arithmetic of a run.

    Args:
        setting: "auto", "bf16" or "fp32".
        device: "auto", "cpu" or "cuda".

    Raises:
        UsageError: the device is unknown or does not exist.
    """
    device = resolve_device(device)
    native = torch.cuda.is_bf16_supported() if device == "cuda" else _cpu_has_bf16()
    bf16 = native if setting == "auto" else setting == "bf16"
    return Precision(device, bf16, channels_last=bf16)


def set_threads(count: int | None, processes: int = 1) -> None:
    """Set the number of threads of torch.

    Args:
        count: number of threads; None = all usable cores, divided among `processes`.
        processes: number of training processes on this machine.
    """
    torch.set_num_threads(count or max(1, read_limits().threads // processes))


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step; a no-op with other C libraries.

    By default glibc maps every large activation afresh and returns it to the kernel, which costs a page fault per
    page: 40 % of the time of a step on SmallCNN.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _cpu_has_bf16() -> bool:
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_info("flags").split())
