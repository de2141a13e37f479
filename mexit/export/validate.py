"""Compare exported graphs with the network they come from, exit by exit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mexit.core.exit_policy import LOWEST, Policy
from mexit.errors import BackendError
from mexit.export.nested_if import policy_inputs
from mexit.models import MultiExit

TOLERANCE = 1e-4
SINGLE_FILE_TOLERANCE = 1e-5

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ExitComparison:
    """One exit in another precision, compared with float32.

    Attributes:
        exit: number of the exit in the network, from 1.
        largest_difference: largest |difference| of a logit.
        agreement: fraction of images with the same predicted class, in [0, 1].
        accuracy, accuracy_fp32: fraction of images classified correctly, in [0, 1].
    """

    exit: int
    largest_difference: float
    agreement: float
    accuracy: float
    accuracy_fp32: float


@dataclass(frozen=True)
class PrecisionReport:
    """Every exit of one precision on `n` images of `split`.

    int8 logits come from ONNX Runtime, fp16 logits from torch, because ONNX Runtime on a CPU computes fp16 in float32.
    """

    precision: str
    split: str
    n: int
    exits: tuple[ExitComparison, ...]


def check_against_torch(model: MultiExit, run: Callable[[Floats], Floats], images: Floats) -> list[float]:
    """Compare the exported segments with torch and return the largest |difference| of a logit at each exit, (E,).

    Args:
        model: the network that was exported.
        run: maps images (B, C, H, W) to the logits (E, B, C) of the exported segments.
        images: (B, C, H, W) float32 in [0, 1], from the data set.

    Raises:
        BackendError: an exit differs by more than `TOLERANCE` times its largest logit (at least 1).
    """
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(images)).numpy()
    differences = np.abs(run(images) - expected).max(axis=(1, 2))
    tolerances = TOLERANCE * np.maximum(1.0, np.abs(expected).max(axis=(1, 2)))
    for k, difference, tolerance in zip(model.numbers, differences, tolerances, strict=True):
        if not difference <= tolerance:
            raise BackendError(
                f"exit {k} of the exported network differs from torch by {difference:.2e}, more than {tolerance:.0e}"
            )
    return [float(difference) for difference in differences]


def compare_precisions(
    logits_fp32: Floats, logits: Floats, labels: NDArray[np.int64], numbers: Sequence[int] | None = None
) -> tuple[ExitComparison, ...]:
    """Compare the logits of another precision with those of float32.

    Args:
        logits_fp32, logits: (E, N, C).
        labels: (N,).
        numbers: the number of each exit in the network, (E,); default 1..E.

    Raises:
        BackendError: a logit is not finite: an activation left the range of the precision.
    """
    exits = []
    for k, before, after in zip(numbers or range(1, len(logits) + 1), logits_fp32, logits, strict=True):
        if not np.isfinite(after).all():
            raise BackendError(f"exit {k} has logits that are not finite in this precision: export in fp32")
        predicted, predicted_fp32 = after.argmax(axis=1), before.argmax(axis=1)
        exits.append(
            ExitComparison(
                exit=k,
                largest_difference=float(np.abs(after - before).max()),
                agreement=float((predicted == predicted_fp32).mean()),
                accuracy=float((predicted == labels).mean()),
                accuracy_fp32=float((predicted_fp32 == labels).mean()),
            )
        )
    return tuple(exits)


def check_single_file(
    run: Callable[[Mapping[str, NDArray[Any]]], Sequence[NDArray[Any]]],
    input_name: str,
    images: Floats,
    logits: Floats,
    numbers: Sequence[int] | None = None,
) -> None:
    """Compare a single file, forced to each exit in turn, with the segments.

    Args:
        run: maps the inputs of the file to its outputs, `nested_if.OUTPUTS`.
        input_name: of the image.
        images: (B, C, H, W) float32 in [0, 1].
        logits: (E, B, C), of the segments on these images.
        numbers: of the exits in the network, (E,); default 1..E.

    Raises:
        BackendError: another exit answers, or a logit differs by more than `SINGLE_FILE_TOLERANCE` times the largest
            logit of the exit (at least 1).
    """
    numbers = numbers or range(1, len(logits) + 1)
    for k, (number, expected) in enumerate(zip(numbers, logits, strict=True), start=1):
        inputs = policy_inputs(policy_for_exit(k, len(logits)))
        tolerance = SINGLE_FILE_TOLERANCE * max(1.0, float(np.abs(expected).max()))
        for i, image in enumerate(images):
            actual, _, exit_taken, _ = run({input_name: image[None], **inputs})
            difference = float(np.abs(actual[0] - expected[i]).max())
            if exit_taken[0] != number or not difference <= tolerance:
                raise BackendError(
                    f"the single file, forced to exit {number}, answered at exit {exit_taken[0]} with logits that "
                    f"differ from those of the segments by {difference:.1e}, more than {tolerance:.0e}"
                )


def policy_for_exit(k: int, exits: int) -> Policy:
    """A policy under which every image answers at exit k, from 1."""
    thresholds = tuple(LOWEST if i == k else None for i in range(1, exits))
    return Policy("max-probability", False, (1.0,) * exits, thresholds)
