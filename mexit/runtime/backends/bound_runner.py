"""The optional half of the seam: one image walks through all segments, and its features never leave the engine's
own buffers.

`Segment.run` hands out features that stay valid as long as somebody holds them, so it needs new memory for each.
A walk hands out none: the features of segment k are the inputs of segment k+1 where they lie, in buffers that the
next image finds in place. An engine that can do so has an attribute `walks`; the others get a `PlainRunner`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mexit.errors import BackendError
from mexit.runtime.backends.base import Backend, Carried


class Runner(Protocol):
    """One image at a time, in one thread at a time."""

    def start(self, image: NDArray[np.float32]) -> None:
        """The next image, (1, C, H, W) float32; it is copied or only read."""

    def run(self, k: int) -> NDArray[np.float32]:
        """Run segment `k`, from 1 and in order: logits (1, C), valid until the next `start`."""

    def features(self, k: int) -> None:
        """Run segment `k` in its turn without its head."""


Buffers = list[NDArray[Any]]


class Bindable(Protocol):
    """A segment that can be tied to memory once and then be run again and again."""

    def buffers(self) -> Buffers:
        """New memory for one row of every output."""

    def bind(self, taken: Buffers, given: Buffers) -> Callable[[], None]:
        """What runs it from `taken` into `given`; without its head where `given` has no place for logits."""


class BoundRunner:
    """A walk through bound segments: outputs of one are the inputs of the next.

    A call through such a binding costs an engine a fraction of what new inputs and outputs do.
    """

    def __init__(self, image: NDArray[np.float32], segments: Sequence[Bindable]) -> None:
        """`image`: memory for one image, (1, C, H, W)."""
        self._image, self._segments = image, segments
        self._sides: list[tuple[Buffers, Buffers]] = []  # a binding knows addresses only: these hold the arrays
        self._calls: list[Callable[[], None]] = []
        self._headless: dict[int, Callable[[], None]] = {}
        taken: Buffers = [image]
        for segment in segments:
            given = segment.buffers()
            self._sides.append((taken, given))
            self._calls.append(segment.bind(taken, given))
            taken = given[:-1]

    def start(self, image: NDArray[np.float32]) -> None:
        """See `Runner.start`."""
        if image.shape != self._image.shape:  # it would be broadcast
            raise BackendError(f"the engine was given an image {image.shape}, expected {self._image.shape}")
        np.copyto(self._image, image)

    def run(self, k: int) -> NDArray[np.float32]:
        """See `Runner.run`."""
        self._calls[k - 1]()
        return self._sides[k - 1][1][-1]

    def features(self, k: int) -> None:
        """See `Runner.features`."""
        if k not in self._headless:
            taken, given = self._sides[k - 1]
            self._headless[k] = self._segments[k - 1].bind(taken, given[:-1])
        self._headless[k]()


class RunnerPool:
    """Walks to be lent, as many as there are calls at a time. Safe to share between threads."""

    def __init__(self, make: Callable[[], Runner]) -> None:
        self._make = make
        self._free: list[Runner] = []

    def take(self) -> Runner:
        """A walk that nobody else has."""
        try:
            return self._free.pop()
        except IndexError:
            return self._make()

    def give_back(self, walk: Runner) -> None:
        """Lend it to the next one; nothing that it returned may be read any more."""
        self._free.append(walk)


class PlainRunner:
    """A walk by `Segment.run`, for any engine."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._carried: Carried | None = None

    def start(self, image: NDArray[np.float32]) -> None:
        """See `Runner.start`."""
        self._carried = self._backend.carry(image)

    def run(self, k: int) -> NDArray[np.float32]:
        """See `Runner.run`."""
        self._carried, logits = self._backend.segments[k - 1].run(self._carried)
        return logits

    def features(self, k: int) -> None:
        """See `Runner.features`."""
        self._carried = self._backend.segments[k - 1].features(self._carried)


def of(backend: Backend) -> RunnerPool | None:
    """The engine's own walks, if it has any."""
    walks: RunnerPool | None = getattr(backend, "walks", None)
    return walks
