"""Records a trace: the logits of every exit of the deployed bundle on a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from mexit.core.trace import Origin, Trace
from mexit.runtime.backends.base import Backend
from mexit.runtime.reference import run_all_exits

Batch = tuple[NDArray[np.float32], NDArray[np.int64] | None, NDArray[np.int64]]


def record_trace(
    backend: Backend,
    batches: Iterable[Batch],
    *,
    model: str,
    split: str,
    condition: str,
    data_sha256: str,
    progress: Callable[[int], None] | None = None,
) -> Trace:
    """Run every exit on every batch.

    Args:
        backend: the engine that will be deployed.
        batches: images (B, C, H, W) float32 in [0, 1], labels (B,) int64 or None, and indices in the data set (B,)
            int64.
        model: id of the bundle.
        split, condition, data_sha256: see `core.trace.Origin`.
        progress: called with the size of each batch.
    """
    logits, labels, index = [], [], []
    for images, batch_labels, batch_index in batches:
        logits.append(run_all_exits(backend, images))
        index.append(batch_index)
        if batch_labels is not None:
            labels.append(batch_labels)
        if progress is not None:
            progress(len(images))
    origin = Origin(model, backend.variant, backend.engine, backend.precision, split, condition, data_sha256)
    return Trace(
        np.concatenate(logits, axis=1),
        np.concatenate(labels).astype(np.int64) if labels else None,
        np.concatenate(index).astype(np.int64),
        origin,
    )
