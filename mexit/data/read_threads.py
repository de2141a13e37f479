"""Read many pictures on threads, in order and in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mexit.core.resource_limits import read_limits
from mexit.data.dataset import split_batches

T = TypeVar("T")
_CHUNK = 256


def map_on_threads(read: Callable[[int], T], index: NDArray[np.int64]) -> Generator[T, None, None]:
    """Call a function for every position, on one thread per core.

    Closing the iterator, or an error in it, ends the threads after the call that each is in.

    Args:
        read: position of a picture to a result.
        index: positions, (n,).

    Yields:
        The results in the order of `index`.
    """
    pool = ThreadPoolExecutor(read_limits().threads)
    try:
        for chunk in split_batches(index, _CHUNK):
            yield from pool.map(read, chunk.tolist())
    finally:
        pool.shutdown(cancel_futures=True)
