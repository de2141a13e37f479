"""Runs one image through all segments in buffers that are bound once, instead of allocating for every call.

`Segment.run` returns features that stay valid as long as they are referenced, so it allocates memory for each call. A
`BoundRunner` connects the outputs of segment k to the inputs of segment k+1 once, and every image overwrites the same
buffers. An engine that supports this has an attribute `runners`, a `RunnerPool`; for others there is `PlainRunner`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mexit.errors import BackendError
from mexit.runtime.backends.base import Backend, Carried

Buffers = list[NDArray[Any]]


class Runner(Protocol):
    """Runs one image at a time. Not thread-safe."""

    def start(self, image: NDArray[np.float32]) -> None:
        """Set the image, (1, C, H, W) float32 in [0, 1]; it is not changed."""

    def run(self, k: int) -> NDArray[np.float32]:
        """Run segment k (from 1, in order); returns logits (1, C), which are valid until the next `start`."""

    def features(self, k: int) -> None:
        """Run segment k without its head."""


class Bindable(Protocol):
    """A segment that can be bound to buffers."""

    def buffers(self) -> Buffers:
        """New buffers for one row of every output; the logits come last."""

    def bind(self, inputs: Buffers, outputs: Buffers) -> Callable[[], None]:
        """A function that runs the segment from `inputs` into `outputs`; without its head if the logits are missing."""


class BoundRunner:
    """A `Runner` through bound segments. A bound call costs an engine a fraction of one with new inputs and outputs."""

    def __init__(self, image: NDArray[np.float32], segments: Sequence[Bindable]) -> None:
        """`image`: a buffer for one image, (1, C, H, W)."""
        self._image, self._segments = image, segments
        # A binding stores addresses only; these lists keep the arrays alive.
        self._buffers: list[tuple[Buffers, Buffers]] = []
        self._calls: list[Callable[[], None]] = []
        self._headless_calls: dict[int, Callable[[], None]] = {}
        inputs: Buffers = [image]
        for segment in segments:
            outputs = segment.buffers()
            self._buffers.append((inputs, outputs))
            self._calls.append(segment.bind(inputs, outputs))
            inputs = outputs[:-1]

    def start(self, image: NDArray[np.float32]) -> None:
        if image.shape != self._image.shape:  # numpy would broadcast it
            raise BackendError(f"the engine was given an image {image.shape}, expected {self._image.shape}")
        np.copyto(self._image, image)

    def run(self, k: int) -> NDArray[np.float32]:
        self._calls[k - 1]()
        return self._buffers[k - 1][1][-1]

    def features(self, k: int) -> None:
        if k not in self._headless_calls:
            inputs, outputs = self._buffers[k - 1]
            self._headless_calls[k] = self._segments[k - 1].bind(inputs, outputs[:-1])
        self._headless_calls[k]()


class RunnerPool:
    """Runners for concurrent calls; it makes one when none is free. Thread-safe."""

    def __init__(self, make: Callable[[], Runner]) -> None:
        self._make = make
        self._free: list[Runner] = []

    def take(self) -> Runner:
        """A runner that no other call uses."""
        try:
            return self._free.pop()
        except IndexError:
            return self._make()

    def give_back(self, runner: Runner) -> None:
        """Free a runner; arrays that it returned are no longer valid."""
        self._free.append(runner)


class PlainRunner:
    """A `Runner` for any engine, by `Segment.run`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._carried: Carried | None = None

    def start(self, image: NDArray[np.float32]) -> None:
        self._carried = self._backend.carry(image)

    def run(self, k: int) -> NDArray[np.float32]:
        self._carried, logits = self._backend.segments[k - 1].run(self._carried)
        return logits

    def features(self, k: int) -> None:
        self._carried = self._backend.segments[k - 1].features(self._carried)


def runner_pool(backend: Backend) -> RunnerPool | None:
    """The pool of bound runners of an engine; None if it has none."""
    runners: RunnerPool | None = getattr(backend, "runners", None)
    return runners
