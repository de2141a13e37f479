"""Runs one image through all segments in buffers that are bound once, instead of allocating for every call.

`Segment.run` returns features that stay valid as long as they are referenced, so it allocates memory for each call. A
`BoundRunner` connects the outputs of segment k to the inputs of segment k+1 once, and every image overwrites the same
buffers. An engine that supports this has the attributes `runners` and `static_runners`, each a `RunnerPool` or None;
for others there is `PlainRunner`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mexit.errors import BackendError
from mexit.runtime.backends.base import Carried, Segment

Buffers = list[NDArray[Any]]


class Runner(Protocol):
    """Runs one image at a time. Not thread-safe."""

    def start(self, image: NDArray[np.float32]) -> None:
        """Set the image, (1, C, H, W) float32 in [0, 1]; it is not changed."""

    def run(self, k: int) -> NDArray[np.float32]:
        """Run segment k (from 1, in order); returns logits (1, C), which are valid until the next `start`."""


class Bindable(Protocol):
    """A segment that can be bound to buffers."""

    def buffers(self) -> Buffers:
        """New buffers for one row of every output; the logits come last."""

    def bind(self, inputs: Buffers, outputs: Buffers) -> Callable[[], None]:
        """A function that runs the segment from `inputs` into `outputs`."""


class BoundRunner:
    """A `Runner` through bound segments. A bound call costs an engine a fraction of one with new inputs and outputs."""

    def __init__(self, image: NDArray[np.float32], segments: Sequence[Bindable]) -> None:
        """`image`: a buffer for one image, (1, C, H, W)."""
        self._image = image
        self._buffers: list[Buffers] = []  # a binding stores addresses only, so this list keeps the arrays alive
        self._calls: list[Callable[[], None]] = []
        inputs: Buffers = [image]
        for segment in segments:
            outputs = segment.buffers()
            self._buffers.append(outputs)
            self._calls.append(segment.bind(inputs, outputs))
            inputs = outputs[:-1]

    def start(self, image: NDArray[np.float32]) -> None:
        if image.shape != self._image.shape:  # numpy would broadcast it
            raise BackendError(f"the engine was given an image {image.shape}, expected {self._image.shape}")
        np.copyto(self._image, image)

    def run(self, k: int) -> NDArray[np.float32]:
        self._calls[k - 1]()
        return self._buffers[k - 1][-1]


class RunnerPool:
    """Runners for concurrent calls; it makes one when none is free. Thread-safe."""

    def __init__(self, make: Callable[[], Runner]) -> None:
        self._make = make
        self._free: list[Runner] = []

    @staticmethod
    def of(segments: Sequence[Bindable], shape: Sequence[int]) -> RunnerPool:
        """A pool of bound runners of segments, for images of shape (C, H, W)."""
        return RunnerPool(lambda: BoundRunner(np.zeros((1, *shape), np.float32), segments))

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

    def __init__(self, carry: Callable[[NDArray[np.float32]], Carried], segments: Sequence[Segment]) -> None:
        """`carry`: see `Backend.carry`."""
        self._carry, self._segments = carry, segments
        self._carried: Carried | None = None

    def start(self, image: NDArray[np.float32]) -> None:
        self._carried = self._carry(image)

    def run(self, k: int) -> NDArray[np.float32]:
        self._carried, logits = self._segments[k - 1].run(self._carried)
        return logits
