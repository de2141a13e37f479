"""Checks an opened version before it answers: stored answers, finite outputs, and a warm-up of the engine.

A bundle with calibration images holds the engine's answers to them: the logits in the traces that set its thresholds.
The engine must give the same classes at every exit. Other devices compute slightly different numbers, so a few images
may differ.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mexit.core.policies_file import PolicyEntry
from mexit.data.calibration_images import CalibrationImages
from mexit.errors import BackendError
from mexit.runtime.engine import runs_static
from mexit.runtime.policy_selection import entry_or_none
from mexit.runtime.reference import run_all_exits
from mexit.runtime.runtime import Runtime

IMAGES = 32
SAME_CLASS = 0.9  # share of the images, at every exit
WARM_UP = 3


def check_answers(runtime: Runtime) -> int:
    """Compare the classes of stored images with those in the trace of the same images.

    Args:
        runtime: the opened version.

    Returns:
        The number of images that were compared; 0 if the bundle holds no calibration images or no trace of them.

    Raises:
        BackendError: the classes of an exit differ, or logits are not finite.
        Damaged, NotFound: a stored file cannot be used.
    """
    entry = entry_or_none(runtime.bundle, runtime.backend)
    stored = None if entry is None else _stored(runtime, entry)
    if stored is None:
        size = runtime.bundle.manifest.input.shape
        _check_finite(run_all_exits(runtime.backend, np.full((1, *size), 0.5, np.float32)))
        return 0
    images, expected = stored
    logits = run_all_exits(runtime.backend, images)
    _check_finite(logits)
    same = (logits.argmax(axis=2) == expected.argmax(axis=2)).sum(axis=1)
    for number, count in zip(runtime.bundle.manifest.numbers, same.tolist(), strict=True):
        if count < SAME_CLASS * len(images):
            raise BackendError(
                f"exit {number} answers {count} of {len(images)} stored images as it did at calibration: "
                f"the engine {runtime.backend.engine} computes other results here, run mexit doctor"
            )
    return len(images)


def warm_up(runtime: Runtime) -> None:
    """Run every segment, and the static network if the default budget uses it: first runs of an engine are slow."""
    exits = len(runtime.backend.segments)
    for _ in range(WARM_UP):
        for k in range(1, exits + 1):
            runtime.run_to_exit(k)
    if runs_static(runtime.backend, runtime.policy(), exits, any_exit=runtime.rate_limiter is not None):
        static = Runtime(runtime.bundle, runtime.backend, "full", threads=runtime.threads)
        image = np.full((1, *runtime.bundle.manifest.input.shape), 0.5, np.float32)
        for _ in range(WARM_UP):
            static.answer_tensor(image)


def _stored(runtime: Runtime, entry: PolicyEntry) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Stored images (N, C, H, W) float32 and their logits (E, N, C) float32; None if there are none."""
    manifest = runtime.bundle.manifest
    for ref in (entry.trace, *entry.evidence):
        file = f"calibration/{ref.split}-clean.npz"
        if ref.condition != "clean" or not any(spec.file == file for spec in manifest.calibration):
            continue
        content = runtime.bundle.content(file)
        images = CalibrationImages.from_bytes(content, file, manifest.input, len(manifest.classes))
        trace = runtime.bundle.load_trace(ref)
        _, mine, theirs = np.intersect1d(images.index, trace.index, return_indices=True)
        if len(mine) and images.data_sha256 == trace.origin.data_sha256:
            return images.images[mine[:IMAGES]], trace.logits[:, theirs[:IMAGES]]
    return None


def _check_finite(logits: NDArray[np.float32]) -> None:
    if not np.isfinite(logits).all():
        raise BackendError("the network computes values that are not finite")
