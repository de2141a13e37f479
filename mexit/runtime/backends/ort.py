"""ONNX Runtime on CPU: one session per segment.

Every session has its own thread pool. Idle threads of one session that spin take the processors that the next session
needs (measured: ten times the CPU time). Spinning is therefore off, and one thread is the default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.bundle import Bundle
from mexit.core.manifest import SegmentSpec, TensorSpec
from mexit.core.resource_limits import check_threads
from mexit.core.versions import installed_version
from mexit.errors import BackendError, missing_extra
from mexit.runtime.backends.base import HostCarried, Segment
from mexit.runtime.backends.bound_runner import Buffers, RunnerPool


class OrtSegment(Segment):
    """One segment in an ONNX Runtime session."""

    def __init__(
        self,
        content: bytes,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        file: str,
        threads: int = 1,
    ) -> None:
        """Load a segment.

        Args:
            content: bytes of the ONNX file.
            inputs, outputs: tensors in the order of the manifest; the logits are the last output.
            file: name of the file, for messages.
            threads: number of threads.

        Raises:
            MissingExtra, BackendError: see `OrtBackend`.
        """
        self.session = open_session(content, file, threads)
        self._inputs, self._outputs = [one.name for one in inputs], [one.name for one in outputs]
        self._output_specs = outputs

    def run(self, carried: HostCarried) -> tuple[HostCarried, NDArray[np.float32]]:
        inputs = dict(zip(self._inputs, carried.arrays, strict=True))
        try:
            *features, logits = self.session.run(self._outputs, inputs)
        except Exception as error:  # onnxruntime raises classes of its C++ module
            raise BackendError(f"onnxruntime failed: {error}") from error
        return HostCarried(features), logits

    def buffers(self) -> Buffers:
        return [np.zeros((1, *tensor.shape[1:]), tensor.dtype) for tensor in self._output_specs]

    def bind(self, inputs: Buffers, outputs: Buffers) -> Callable[[], None]:
        session = self.session
        binding = session.io_binding()
        try:
            for name, array in zip(self._inputs, inputs, strict=True):
                binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            for name, array in zip(self._outputs, outputs, strict=True):
                binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        except Exception as error:
            raise BackendError(f"onnxruntime failed: {error}") from error

        def call() -> None:
            try:
                session.run_with_iobinding(binding)
            except Exception as error:
                raise BackendError(f"onnxruntime failed: {error}") from error

        return call


class OrtBackend:
    """All segments of one variant of a bundle in ONNX Runtime."""

    engine = "ort"

    def __init__(self, bundle: Bundle, threads: int = 1, precision: str = "fp32") -> None:
        """Load all segments.

        Args:
            bundle: an opened bundle.
            threads: number of threads of each segment; segments run one after the other.
            precision: also the name of the variant whose segments are loaded; their graphs have this precision.

        Raises:
            UsageError: less than one thread.
            MissingExtra: onnxruntime is not installed.
            BackendError: it cannot load a segment, or both of its packages are installed.
        """
        check_threads(threads)
        self.precision = self.variant = precision
        specs = bundle.manifest.variants[self.variant].segments
        segments = [
            OrtSegment(bundle.segment(self.variant, k), spec.inputs, spec.outputs, spec.file, threads)
            for k, spec in enumerate(specs, start=1)
        ]
        self._bundle, self._threads = bundle, threads
        self.segments: Sequence[Segment] = segments
        self.runners: RunnerPool | None = None
        if all(map(_has_fixed_sizes, specs)):
            self.runners = RunnerPool.of(segments, bundle.manifest.input.shape)

    @cached_property
    def static(self) -> OrtSegment | None:
        spec = self._bundle.manifest.variants[self.variant].static
        if spec is None:
            return None
        return OrtSegment(self._bundle.static(self.variant), spec.inputs, spec.outputs, spec.file, self._threads)

    @cached_property
    def static_runners(self) -> RunnerPool | None:
        return None if self.static is None else RunnerPool.of([self.static], self._bundle.manifest.input.shape)

    def carry(self, images: NDArray[np.float32]) -> HostCarried:
        return HostCarried([np.ascontiguousarray(images)])


def _has_fixed_sizes(spec: SegmentSpec) -> bool:
    """Whether all sizes except that of the batch are known, so that buffers can be allocated in advance."""
    return all(min(tensor.shape[1:], default=1) > 0 for tensor in (*spec.inputs, *spec.outputs))


def load_onnxruntime() -> Any:
    """Import onnxruntime.

    Raises:
        MissingExtra: it is not installed.
        BackendError: both of its packages are installed.
    """
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
    """An ONNX Runtime session of an ONNX file with the settings of this module. Raises as `OrtBackend`.

    Args:
        content: bytes of the ONNX file.
        file: name of the file, for messages.
        threads: number of threads.
    """
    runtime = load_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its C++ module
        raise BackendError(f"onnxruntime cannot load {file}: {error}") from error
