"""Batches of prepared images in their order, the next ones made while the current one trains.

The work is done by threads: reading, Pillow's decoding and resizing and numpy's arithmetic let go of the
interpreter, and a finished batch need not be copied from another process. Pixels and order are those of
`DataSet.batch`, which `workers` 0 calls directly.
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

THREADS = "mexit-batches"
MAX_DEFAULT = 16


def workers_for(data: DataSet, asked: int | None) -> int:
    """How many threads prepare batches: what was asked for, else one a core for files and none for arrays.

    Raises:
        UsageError: fewer than 0.
    """
    if asked is not None and asked < 0:
        raise UsageError(f"--workers must be at least 0 (0 prepares images in the training loop), found {asked}")
    if asked is None:
        return min(read_limits().threads, MAX_DEFAULT) if data.streamed else 0
    return asked


def prepared(
    data: DataSet, parts: Sequence[NDArray[np.int64]], spec: InputSpec, workers: int
) -> Generator[NDArray[np.float32], None, None]:
    """The images of each part, in order.

    At most `workers` batches are under way or wait while the consumer holds one. Closing the iterator, or its end
    by an error, ends the threads; a batch under way is finished first.

    Args:
        data: where the images are.
        parts: places in the data set, (B,) each.
        spec: the input that they are prepared for.
        workers: threads; 0 prepares each batch when it is asked for.

    Yields:
        (B, C, H, W) float32 in [0, 1].

    Raises:
        BadInput, NotFound, Damaged: an image that cannot be read, by name, when it is its batch's turn.
    """
    if not workers:
        for part in parts:
            yield data.batch(part, spec)
        return
    left = iter(parts)
    pool = ThreadPoolExecutor(workers, THREADS)
    try:
        waiting: deque[Future[NDArray[np.float32]]] = deque(
            pool.submit(data.batch, part, spec) for part in islice(left, workers)
        )
        while waiting:
            images = waiting.popleft().result()
            waiting.extend(pool.submit(data.batch, part, spec) for part in islice(left, 1))
            yield images
    finally:
        pool.shutdown(cancel_futures=True)
