"""Prepared training images in the memory of a device, so that no batch has to be loaded and transferred."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mexit.core.manifest import InputSpec
from mexit.data.dataset import DataSet, split_batches

LOAD_BATCH = 1024
MEMORY_SHARE = 0.25  # of the free memory of the device; the network needs the rest


class DeviceImages:
    """The images of a split on a device.

    Args:
        data: data set.
        index: positions of the split in the data set, (N,).
        spec: input specification that the images are prepared for.
        device: torch device.
    """

    def __init__(self, data: DataSet, index: NDArray[np.int64], spec: InputSpec, device: str) -> None:
        shape = (len(index), spec.channels, *spec.size)
        self._images = torch.empty(shape, dtype=torch.float32, device=device)
        rows = np.full(len(data.labels), -1, np.int64)
        rows[index] = np.arange(len(index))
        for part in split_batches(index, LOAD_BATCH):
            self._images[torch.from_numpy(rows[part]).to(device)] = torch.from_numpy(data.batch(part, spec)).to(device)
        self._rows = torch.from_numpy(rows).to(device)

    def batch(self, index: Tensor) -> Tensor:
        """Images at positions of the data set: (B,) int64 on the device to (B, C, H, W) float32 in [0, 1]."""
        return self._images[self._rows[index]]

    @staticmethod
    def fit(data: DataSet, count: int, spec: InputSpec, device: str) -> bool:
        """Whether `count` images of a data set in memory take at most `MEMORY_SHARE` of a CUDA device's free memory."""
        if device != "cuda" or data.streamed:
            return False
        free, _ = torch.cuda.mem_get_info()
        return 4 * count * spec.channels * prod(spec.size) <= MEMORY_SHARE * free
