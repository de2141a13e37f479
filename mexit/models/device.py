"""The device of a network, and float32 arithmetic without TensorFloat-32 on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

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
