"""Records a trace: the logits of every exit of a network on a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from mexit.core.trace import Origin, Trace

Batch = tuple[NDArray[np.float32], NDArray[np.int64] | None, NDArray[np.int64]]


def record_trace(
    run_batch: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    batches: Iterable[Batch],
    origin: Origin,
    progress: Callable[[int], None] | None = None,
) -> Trace:
    """Run every exit on every batch.

    Args:
        run_batch: images (B, C, H, W) to the logits of every exit (E, B, C), by the engine that will be deployed.
        batches: images (B, C, H, W) float32 in [0, 1], labels (B,) int64 or None, and indices in the data set (B,)
            int64.
        origin: the bundle, the engine and the data.
        progress: called with the size of each batch.
    """
    logits, labels, index = [], [], []
    for images, batch_labels, batch_index in batches:
        logits.append(run_batch(images))
        index.append(batch_index)
        if batch_labels is not None:
            labels.append(batch_labels)
        if progress is not None:
            progress(len(images))
    return Trace(
        np.concatenate(logits, axis=1),
        np.concatenate(labels).astype(np.int64) if labels else None,
        np.concatenate(index).astype(np.int64),
        origin,
    )
