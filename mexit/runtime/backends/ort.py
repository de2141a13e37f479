"""ONNX Runtime on CPU: one session a segment.

Every session owns a thread pool, and threads of a finished segment that keep spinning take the cores that the
next one needs (measured: ten times the CPU time). So spinning is off and one thread is the default.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.bundle import Bundle
from mexit.core.onnx_prune import without_outputs
from mexit.errors import BackendError, UsageError, missing_extra
from mexit.runtime.backends.base import HostCarried, Segment

_NO_SPINNING = "session.intra_op.allow_spinning"


class OrtSegment:
    """One ONNX Runtime session. Inputs and outputs are positional, as the manifest lists them."""

    def __init__(
        self, session: Any, inputs: list[str], outputs: list[str], open_headless: Callable[[], Any]
    ) -> None:
        """`open_headless` loads the same segment without its logits, when that is first asked for."""
        self._session = session
        self._inputs = inputs
        self._outputs = outputs
        self._headless = lru_cache(maxsize=1)(open_headless)

    def run(self, carried: HostCarried) -> tuple[HostCarried, NDArray[np.float32]]:
        """See `base.Segment.run`."""
        *features, logits = self._run(self._session, self._outputs, carried)
        return HostCarried(features), logits

    def features(self, carried: HostCarried) -> HostCarried:
        """See `base.Segment.features`."""
        return HostCarried(self._run(self._headless(), self._outputs[:-1], carried))

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
        runtime = load_onnxruntime()
        self.precision = self.variant = precision
        variant = bundle.manifest.variants[self.variant]
        self.segments: list[Segment] = []
        for k, spec in enumerate(variant.segments, start=1):
            content = bundle.segment(self.variant, k)
            inputs, outputs = [[tensor.name for tensor in side] for side in (spec.inputs, spec.outputs)]

            def open_headless(content: bytes = content, file: str = spec.file, head: str = outputs[-1]) -> Any:
                return _open_session(runtime, without_outputs(content, [head], file), file, threads)

            session = _open_session(runtime, content, spec.file, threads)
            self.segments.append(OrtSegment(session, inputs, outputs, open_headless))

    def carry(self, images: NDArray[np.float32]) -> HostCarried:
        """See `base.Backend.carry`."""
        return HostCarried([np.ascontiguousarray(images)])


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


def _open_session(runtime: Any, content: bytes, file: str, threads: int) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(_NO_SPINNING, "0")
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its own C++ module
        raise BackendError(f"onnxruntime cannot load {file}: {error}") from error
