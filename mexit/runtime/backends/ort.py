"""ONNX Runtime on CPU: one session a segment.

Every session owns a thread pool, and threads of a finished segment that keep spinning take the cores that the
next one needs (measured: ten times the CPU time). So spinning is off and one thread is the default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.bundle import Bundle
from mexit.core.manifest import SegmentSpec, TensorSpec
from mexit.core.versions import installed_version
from mexit.errors import BackendError, UsageError, missing_extra
from mexit.runtime.backends.base import HostCarried, Segment
from mexit.runtime.backends.bound_runner import BoundRunner, Buffers, RunnerPool
from mexit.runtime.backends.head_removal import without_outputs

_NO_SPINNING = "session.intra_op.allow_spinning"


class OrtSegment:
    """One ONNX Runtime session. Inputs and outputs are positional, as the manifest lists them."""

    def __init__(
        self,
        content: bytes,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        file: str,
        threads: int = 1,
    ) -> None:
        """Load a segment from its ONNX bytes; `file` is what an error calls it. Raises as `OrtBackend`."""
        self.session = open_session(content, file, threads)
        self._inputs, self._outputs = ([tensor.name for tensor in side] for side in (inputs, outputs))
        self._given = outputs
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

    def buffers(self) -> Buffers:
        """See `walk.Bindable.buffers`."""
        return [np.zeros((1, *tensor.shape[1:]), tensor.dtype) for tensor in self._given]

    def bind(self, taken: Buffers, given: Buffers) -> Callable[[], None]:
        """See `walk.Bindable.bind`."""
        session = self.session if len(given) == len(self._given) else self.headless
        binding = session.io_binding()

        def call() -> None:
            try:
                session.run_with_iobinding(binding)
            except Exception as error:  # onnxruntime raises classes of its own C++ module
                raise BackendError(f"onnxruntime failed: {error}") from error

        try:
            for name, array in zip(self._inputs, taken, strict=True):
                binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            for name, array in zip(self._outputs, given, strict=False):
                binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        except Exception as error:
            raise BackendError(f"onnxruntime failed: {error}") from error
        return call

    def _run(self, session: Any, outputs: list[str], carried: HostCarried) -> list[NDArray[np.float32]]:
        feeds = dict(zip(self._inputs, carried.arrays, strict=True))
        try:
            found: list[NDArray[np.float32]] = session.run(outputs, feeds)
        except Exception as error:  # onnxruntime raises classes of its own C++ module
            raise BackendError(f"onnxruntime failed: {error}") from error
        return found


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
            OrtSegment(bundle.segment(self.variant, k), spec.inputs, spec.outputs, spec.file, threads)
            for k, spec in enumerate(specs, start=1)
        ]
        self.segments: list[Segment] = [*opened]
        shape = (1, *bundle.manifest.input.shape)
        fixed = all(map(_has_fixed_sizes, specs))
        self.walks = RunnerPool(lambda: BoundRunner(np.zeros(shape, np.float32), opened)) if fixed else None

    def carry(self, images: NDArray[np.float32]) -> HostCarried:
        """See `base.Backend.carry`."""
        return HostCarried([np.ascontiguousarray(images)])


def _has_fixed_sizes(spec: SegmentSpec) -> bool:
    """Whether nothing but the batch is open, so that buffers can be made beforehand."""
    return all(min(tensor.shape[1:], default=1) > 0 for tensor in (*spec.inputs, *spec.outputs))


def load_onnxruntime() -> Any:
    """Import onnxruntime, or say what to type."""
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if installed_version(name)]
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
