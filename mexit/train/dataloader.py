"""Batches of prepared images in a given order, loaded ahead by threads.

Threads suffice because reading, Pillow's decoding and resizing, and numpy's arithmetic release the interpreter lock;
a batch then needs no copy from another process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from mexit.core.manifest import InputSpec
from mexit.core.resource_limits import read_limits
from mexit.data.dataset import DataSet
from mexit.errors import UsageError

THREAD_NAME = "mexit-dataloader"
MAX_DEFAULT_WORKERS = 16


def worker_count(data: DataSet, requested: int | None) -> int:
    """The number of loader threads.

    Args:
        data: data set to load.
        requested: number of threads, or None for one per core if the images are files and 0 if they are in memory.

    Raises:
        UsageError: `requested` is negative.
    """
    if requested is None:
        return min(read_limits().threads, MAX_DEFAULT_WORKERS) if data.streamed else 0
    if requested < 0:
        raise UsageError(f"--workers must be at least 0 (0 loads images in the training loop), found {requested}")
    return requested


def load_batches(
    data: DataSet, batches: Sequence[NDArray[np.int64]], spec: InputSpec, workers: int
) -> Generator[NDArray[np.float32], None, None]:
    """Load and prepare batches in order.

    At most `workers` batches are loading or waiting while the consumer holds one. Closing the iterator, or an error
    in it, ends the threads after the batch that each is loading.

    Args:
        data: data set to read.
        batches: positions in the data set, one array (B,) per batch.
        spec: input specification that the images are prepared for.
        workers: number of threads; 0 loads each batch when it is requested.

    Yields:
        (B, C, H, W) float32 in [0, 1].

    Raises:
        BadInput, NotFound, Damaged: an image of the batch cannot be read; the message names it.
    """
    if not workers:
        for batch in batches:
            yield data.batch(batch, spec)
        return
    remaining = iter(batches)
    pool = ThreadPoolExecutor(workers, THREAD_NAME)
    try:
        pending: deque[Future[NDArray[np.float32]]] = deque(
            pool.submit(data.batch, batch, spec) for batch in islice(remaining, workers)
        )
        while pending:
            images = pending.popleft().result()
            pending.extend(pool.submit(data.batch, batch, spec) for batch in islice(remaining, 1))
            yield images
    finally:
        pool.shutdown(cancel_futures=True)
