"""How a device computes fastest: bf16 on processors with native bf16, in the memory format that fits.

On such a processor training runs under autocast in channels_last with `fast_layers`, and attacks run on a folded
copy in bf16 (`folded`); `benchmarks/training_speed.py` measures both together against plain float32. The recipe
"fp32" is the plain path. The attack in bf16 trains as well as in float32; every reported robustness is computed in
float32.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from mexit.core.resource_limits import cpu_info, read_limits
from mexit.errors import UsageError
from mexit.models.multi_exit import MultiExit
from mexit.train.fast_layers import optimise_layers
from mexit.train.fused_eval_copy import FusedEvalCopy

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


@dataclass(frozen=True)
class Precision:
    """A device and a precision.

    Attributes:
        device: "cpu" or "cuda".
        bf16: autocast to bfloat16.
        channels_last: the memory format of images and weights.
    """

    device: str
    bf16: bool
    channels_last: bool

    def autocast(self) -> AbstractContextManager[object]:
        """The context for forward passes in training."""
        return torch.autocast(self.device, torch.bfloat16) if self.bf16 else nullcontext()

    def place(self, model: MultiExit) -> MultiExit:
        """The model on the device, in the recipe's memory format, with the fastest layers for it."""
        model = model.to(self.device)
        if self._quick:
            optimise_layers(model)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model  # type: ignore[call-overload]

    def attack_copy(self, model: MultiExit) -> FusedEvalCopy | None:
        """What to craft with in place of `model`, or None where that has not been measured to pay."""
        return FusedEvalCopy(model) if self._quick else None

    @property
    def _quick(self) -> bool:
        return self.bf16 and self.device == "cpu"

    def images(self, images: Tensor) -> Tensor:
        """A batch on the device, in the recipe's memory format."""
        images = images.to(self.device, non_blocking=True)
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images


def choose(recipe: str, device: str, model: str) -> Precision:
    """The recipe for a setting ("auto", "bf16", "fp32"), a device ("auto", "cpu", "cuda") and a network."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise UsageError(f"unknown device '{device}': choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here; choose cpu, or install a CUDA build")
    native = torch.cuda.is_bf16_supported() if device == "cuda" else _cpu_has_bf16()
    bf16 = native if recipe == "auto" else recipe == "bf16"
    gaps = model.startswith("msdnet") and device != "cpu"  # its concatenations, where no fast layers close them
    return Precision(device, bf16, channels_last=bf16 and not gaps)


def use_threads(count: int | None, processes: int = 1) -> None:
    """Set torch's threads; None = all cores this process may use, divided among `processes` on this machine."""
    torch.set_num_threads(count or max(1, read_limits().threads // processes))


def keep_freed_memory() -> None:
    """Have glibc keep what training frees, for the next step; elsewhere this does nothing.

    By default every large activation is mapped afresh from the kernel and handed back, and its pages fault in one
    by one: on SmallCNN that took 40 % of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _cpu_has_bf16() -> bool:
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_info("flags").split())
