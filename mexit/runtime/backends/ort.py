"""ONNX Runtime on CPU: one session a segment.

Every session owns a thread pool, and threads of a finished segment that keep spinning take the cores that the
next one needs (measured: ten times the CPU time). So spinning is off and one thread is the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.bundle import Bundle
from mexit.core.manifest import SegmentSpec, TensorSpec
from mexit.core.onnx_prune import without_outputs
from mexit.errors import BackendError, UsageError, missing_extra
from mexit.runtime.backends.base import HostCarried, Segment
from mexit.runtime.backends.walk import Walks

_NO_SPINNING = "session.intra_op.allow_spinning"


class OrtSegment:
    """One ONNX Runtime session. Inputs and outputs are positional, as the manifest lists them."""

    def __init__(
        self, content: bytes, inputs: Sequence[str], outputs: Sequence[str], file: str, threads: int
    ) -> None:
        self.session = open_session(content, file, threads)
        self._inputs, self._outputs = list(inputs), list(outputs)
        self._content, self._file, self._threads = content, file, threads

    @cached_property
    def headless(self) -> Any:
        """A session of the same segment without its head, loaded when that is first asked for."""
        content = without_outputs(self._content, self._outputs[-1:], self._file)
        return open_session(content, self._file, self._threads)

    def run(self, carried: HostCarried) -> tuple[HostCarried, NDArray[np.float32]]:
        """See `base.Segment.run`."""
        *features, logits = self._run(self.session, self._outputs, carried)
        return HostCarried(features), logits

    def features(self, carried: HostCarried) -> HostCarried:
        """See `base.Segment.features`."""
        return HostCarried(self._run(self.headless, self._outputs[:-1], carried))

    def _run(self, session: Any, outputs: list[str], carried: HostCarried) -> list[NDArray[np.float32]]:
        feeds = dict(zip(self._inputs, carried.arrays, strict=True))
        try:
            found: list[NDArray[np.float32]] = session.run(outputs, feeds)
        except Exception as error:  # onnxruntime raises classes of its own C++ module
            raise BackendError(f"onnxruntime failed: {error}") from error
        return found


class OrtWalk:
    """See `walk.Walk`: buffers for one image, bound once as outputs of a segment and as inputs of the next.

    A call through such a binding costs ONNX Runtime a fraction of what feeds and new arrays do.
    """

    def __init__(self, segments: Sequence[OrtSegment], specs: Sequence[SegmentSpec]) -> None:
        taken = [_buffer(tensor) for tensor in specs[0].inputs]
        self._image = taken[0]
        self._segments = segments
        self._sides: list[tuple[_Bound, _Bound]] = []  # a binding knows addresses only: these hold the arrays
        self._calls: list[tuple[Any, Any]] = []
        self._headless: dict[int, tuple[Any, Any]] = {}
        for segment, spec in zip(segments, specs, strict=True):
            given = [_buffer(tensor) for tensor in spec.outputs]
            sides = list(zip(spec.inputs, taken, strict=True)), list(zip(spec.outputs, given, strict=True))
            self._sides.append(sides)
            self._calls.append(_bound(segment.session, *sides))
            taken = given[:-1]

    def start(self, image: NDArray[np.float32]) -> None:
        """See `Walk.start`."""
        if image.shape != self._image.shape:  # it would be broadcast
            raise BackendError(f"onnxruntime was given an image {image.shape}, expected {self._image.shape}")
        np.copyto(self._image, image)

    def run(self, k: int) -> NDArray[np.float32]:
        """See `Walk.run`."""
        _call(*self._calls[k - 1])
        return self._sides[k - 1][1][-1][1]

    def features(self, k: int) -> None:
        """See `Walk.features`."""
        if k not in self._headless:
            taken, given = self._sides[k - 1]
            self._headless[k] = _bound(self._segments[k - 1].headless, taken, given[:-1])
        _call(*self._headless[k])


_Bound = list[tuple[TensorSpec, NDArray[Any]]]


def _bound(session: Any, taken: _Bound, given: _Bound) -> tuple[Any, Any]:
    """How to run a session, and on what."""
    binding = session.io_binding()
    try:
        for tensor, array in taken:
            binding.bind_input(tensor.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for tensor, array in given:
            binding.bind_output(tensor.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    except Exception as error:  # onnxruntime raises classes of its own C++ module
        raise BackendError(f"onnxruntime failed: {error}") from error
    return session.run_with_iobinding, binding


def _call(run: Any, binding: Any) -> None:
    try:
        run(binding)
    except Exception as error:  # onnxruntime raises classes of its own C++ module
        raise BackendError(f"onnxruntime failed: {error}") from error


class OrtBackend:
    """Every segment of one variant of a bundle in ONNX Runtime."""

    engine = "ort"
    drops_heads = True

    def __init__(self, bundle: Bundle, threads: int = 1, precision: str = "fp32") -> None:
        """Load all segments.

        Args:
            bundle: an opened, hence checked, bundle.
            threads: of each segment; segments run one after the other, so this many are busy at a time.
            precision: also the name of the variant whose segments are loaded; it lies in their graphs.

        Raises:
            MissingExtra: onnxruntime is not installed.
            BackendError: it cannot load a segment, or two builds of it are installed at once.
        """
        if threads < 1:
            raise UsageError(f"threads must be at least 1, found {threads}")
        self.precision = self.variant = precision
        specs = bundle.manifest.variants[self.variant].segments
        opened = [
            open_segment(bundle.segment(self.variant, k), spec.inputs, spec.outputs, spec.file, threads)
            for k, spec in enumerate(specs, start=1)
        ]
        self.segments: list[Segment] = [*opened]
        self.walks = Walks(lambda: OrtWalk(opened, specs)) if all(map(_has_fixed_sizes, specs)) else None

    def carry(self, images: NDArray[np.float32]) -> HostCarried:
        """See `base.Backend.carry`."""
        return HostCarried([np.ascontiguousarray(images)])


def _has_fixed_sizes(spec: SegmentSpec) -> bool:
    """Whether nothing but the batch is open, so that buffers can be made beforehand."""
    return all(min(tensor.shape[1:], default=1) > 0 for tensor in (*spec.inputs, *spec.outputs))


def _buffer(tensor: TensorSpec) -> NDArray[Any]:
    return np.zeros((1, *tensor.shape[1:]), tensor.dtype)


def load_onnxruntime() -> Any:
    """Import onnxruntime, or say what to type."""
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(installed) == 2:
        raise BackendError(
            "onnxruntime and onnxruntime-gpu are both installed; they share one folder and break each other: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'mexit[cpu]' or 'mexit[gpu]'"
        )
    try:
        import onnxruntime
    except ImportError:
        raise missing_extra("onnxruntime", "cpu", "Running a bundle") from None
    return onnxruntime


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def open_segment(
    content: bytes, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], file: str, threads: int = 1
) -> OrtSegment:
    """Load one segment from its ONNX bytes; `file` is what an error calls it. Raises as `OrtBackend`."""
    taken, given = ([tensor.name for tensor in side] for side in (inputs, outputs))
    return OrtSegment(content, taken, given, file, threads)


def open_session(content: bytes, file: str, threads: int = 1) -> Any:
    """A session with our settings. Raises as `OrtBackend`."""
    runtime = load_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(_NO_SPINNING, "0")
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its own C++ module
        raise BackendError(f"onnxruntime cannot load {file}: {error}") from error
