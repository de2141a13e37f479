"""How far a network in another precision is from the same network in float32, exit by exit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mexit.errors import BackendError


@dataclass(frozen=True)
class ExitParity:
    """One exit.

    Attributes:
        exit: from 1.
        largest_difference: of a logit.
        agreement: share of images that get the same answer as in float32, in [0, 1].
        accuracy, accuracy_fp32: share answered right, in [0, 1].
    """

    exit: int
    largest_difference: float
    agreement: float
    accuracy: float
    accuracy_fp32: float


@dataclass(frozen=True)
class Parity:
    """Every exit of one precision on `n` images of `split`.

    int8 is computed by ONNX Runtime; fp16 by torch, since ONNX Runtime on a CPU would compute it in float32.
    """

    precision: str
    split: str
    n: int
    exits: tuple[ExitParity, ...]


def compare(
    expected: NDArray[np.float32], found: NDArray[np.float32], labels: NDArray[np.int64]
) -> tuple[ExitParity, ...]:
    """Compare logits.

    Args:
        expected, found: (E, N, C), in float32 and in the other precision.
        labels: (N,).

    Raises:
        BackendError: a logit is not finite: the network leaves the range of that precision.
    """
    exits = []
    for k, (before, after) in enumerate(zip(expected, found, strict=True), start=1):
        if not np.isfinite(after).all():
            raise BackendError(f"exit {k} gives logits that are not finite: this precision is too narrow for it")
        answers, answers_before = after.argmax(axis=1), before.argmax(axis=1)
        exits.append(
            ExitParity(
                k,
                float(np.abs(after - before).max()),
                float((answers == answers_before).mean()),
                float((answers == labels).mean()),
                float((answers_before == labels).mean()),
            )
        )
    return tuple(exits)
