"""Pictures of a data set in memory, prepared for one input, so that each file is decoded once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from mexit.core.manifest import InputSpec
from mexit.core.resource_limits import read_limits
from mexit.data.dataset import DataSet, PreparedImages

MEMORY_SHARE = 0.25  # of the memory that this process may use


def fits_in_memory(count: int, spec: InputSpec) -> bool:
    """Whether `count` prepared images take at most `cache_bytes`."""
    return count * prod(spec.shape) <= cache_bytes()


def cache_bytes() -> int:
    """Bytes that a cache may take: `MEMORY_SHARE` of the memory that this process may use."""
    memory = read_limits().memory_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(MEMORY_SHARE * memory)


def with_prepared(
    data: DataSet, index: NDArray[np.int64], spec: InputSpec, batches: Iterable[NDArray[np.float32]]
) -> DataSet:
    """The data set with some of its images in memory.

    Args:
        data: data set.
        index: positions of these images in the data set, (n,).
        spec: input specification that they are prepared for.
        batches: the images in that order, (B, C, H, W) float32 in [0, 1] as `DataSet.batch` returns them.
    """
    pixels = np.empty((len(index), *spec.shape), np.uint8)
    done = 0
    for batch in batches:
        pixels[done : done + len(batch)] = np.rint(batch * np.float32(255))  # exact: the values are bytes / 255
        done += len(batch)
    rows = np.full(len(data), -1, np.int64)
    rows[index] = np.arange(len(index))
    return replace(data, images=PreparedImages(data.images, spec, pixels, rows))
