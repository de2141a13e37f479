"""The device of a network, and float32 arithmetic without TensorFloat-32 on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mexit.errors import UsageError

DEVICES = ("auto", "cpu", "cuda")


def resolve_device(device: str) -> str:
    """The device that a setting names: "cpu" or "cuda".

    Args:
        device: "cpu", "cuda", or "auto" = "cuda" where torch finds a CUDA device, else "cpu".

    Raises:
        UsageError: the device is unknown, or there is no CUDA device.
    """
    if device not in DEVICES:
        raise UsageError(f"unknown device '{device}': choose auto, cpu or cuda")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here; choose cpu, or install a CUDA build")
    return device


def device_of(model: nn.Module) -> torch.device:
    """The device of a network's parameters."""
    return next(model.parameters()).device


def tensors_for(model: nn.Module, *arrays: NDArray[Any]) -> tuple[Tensor, ...]:
    """Numpy arrays as tensors on the device of a network."""
    device = device_of(model)
    return tuple(torch.from_numpy(array).to(device) for array in arrays)


def describe_device(device: torch.device) -> str:
    """The device as reports print it: "cpu", or "cuda" with the name of the card."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


@contextmanager
def exact_float32() -> Iterator[None]:
    """A context (or a decorator) in which CUDA computes float32 in full precision; earlier settings are restored.

    By default cuDNN rounds the inputs of float32 convolutions to TensorFloat-32, which has 10 bits of mantissa. Every
    reported accuracy is computed in this context. Only the settings named `fp32_precision` are used: torch refuses
    programs that mix them with the older `allow_tf32`.
    """
    operators = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [operator.fp32_precision for operator in operators]
    try:
        for operator in operators:
            operator.fp32_precision = "ieee"
        yield
    finally:
        for operator, precision in zip(operators, before, strict=True):
            operator.fp32_precision = precision
