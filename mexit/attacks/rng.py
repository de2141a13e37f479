"""Counter-based random numbers: a pure function of (seed, epoch, stream, sample, element).

The numbers of a sample depend neither on its batch, nor on the process, nor on earlier calls. So a resumed run equals
an uninterrupted one, and a run on two machines equals a run on one. After J. Salmon et al.: Parallel random numbers:
as easy as 1, 2, 3, SC 2011; the mixing function is the finaliser of SplitMix64 (G. Steele, D. Lea, C. Flood, OOPSLA
2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True)
class CounterRNG:
    """Random numbers of one epoch.

    Attributes:
        seed: seed of the run.
        epoch: number of the epoch, from 0.
    """

    seed: int
    epoch: int

    def uniform(self, stream: str, index: Tensor, shape: Sequence[int]) -> Tensor:
        """Uniform numbers in [0, 1) for each sample.

        Args:
            stream: name of the purpose; numbers of different streams are independent.
            index: positions of the samples in the data set, (B,) int64.
            shape: shape of the numbers of one sample.

        Returns:
            (B, *shape) float32.
        """
        sample_keys = _mix(index * _signed(_GOLDEN) + self._key(stream))
        element = torch.arange(1, prod(shape) + 1, dtype=torch.int64, device=index.device)
        bits = _mix(sample_keys[:, None] + element * _signed(_GOLDEN))
        high = _logical_shift(bits, 40)
        return (high.to(torch.float32) * 2.0**-24).reshape(len(index), *shape)

    def permutation(self, count: int) -> NDArray[np.int64]:
        """The order in which this epoch visits `count` samples, (count,)."""
        return np.random.default_rng((self.seed, self.epoch)).permutation(count).astype(np.int64)

    def choice(self, count: int, size: int, step: int) -> NDArray[np.int64]:
        """At most `size` different numbers below `count`, drawn anew at each training step, (min(size, count),)."""
        rng = np.random.default_rng((self.seed, self.epoch, step + 1))
        return rng.choice(count, min(size, count), replace=False).astype(np.int64)

    def seed_layers(self, step: int) -> None:
        """Seed torch's global generator, which dropout uses, for one training step."""
        torch.manual_seed((self._key("layers") + step * _GOLDEN) % 2**63)

    def _key(self, stream: str) -> int:
        words = np.random.SeedSequence([self.seed, self.epoch, *stream.encode()]).generate_state(2, np.uint64)
        return _signed(int(words[0]))


def _mix(value: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64, whose arithmetic wraps like that of uint64."""
    value = (value ^ _logical_shift(value, 30)) * _signed(_MIX_1)
    value = (value ^ _logical_shift(value, 27)) * _signed(_MIX_2)
    return value ^ _logical_shift(value, 31)


def _logical_shift(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
