"""OpenVINO on CPU: one compiled model per segment, for every batch size.

By default OpenVINO computes a float32 graph in bfloat16 if the processor can. The precision is therefore always set,
and the precision of the compiled layers is read back. A model compiled for one batch size would be 8 to 17 % faster at
batch 1 and 8 (measured), but its kernels round differently in bfloat16, and compaction leaves any number of rows. There
is one stream, so concurrent calls take turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.bundle import Bundle
from mexit.core.manifest import SegmentSpec, TensorSpec
from mexit.core.resource_limits import check_threads
from mexit.errors import BackendError, missing_extra
from mexit.runtime.backends.base import HostCarried, Segment
from mexit.runtime.backends.bound_runner import Buffers, RunnerPool

MULTIPLYING_LAYERS = frozenset({"Convolution", "FullyConnected", "MatMul"})


@dataclass(frozen=True)
class Precision:
    """A precision of this engine.

    Attributes:
        variant: the variant of the bundle whose segments are compiled.
        hint: the precision that is asked for.
        expected: names of the precision in the execution graph; at least one multiplying layer must have one of them.
        only: whether every multiplying layer must have one of them.
        features: type of the carried features. Layers that compute in bfloat16 lose nothing by bfloat16 features, and
            no conversion to float32 and back is needed at a cut (small-cnn, 64 rows: three fifths of the time).
    """

    variant: str
    hint: str
    expected: frozenset[str]
    only: bool
    features: str = "f32"


PRECISIONS = {
    "fp32": Precision("fp32", "f32", frozenset({"f32"}), only=True),
    "bf16": Precision("fp32", "bf16", frozenset({"bf16"}), only=False, features="bf16"),
    "int8": Precision("int8", "f32", frozenset({"u8", "i8"}), only=False),
}
# numpy has no bfloat16: uint16 holds its bits.
_NUMPY_TYPES: dict[str, np.dtype[Any]] = {"f32": np.dtype(np.float32), "bf16": np.dtype(np.uint16)}


@dataclass(frozen=True)
class _Compiler:
    """Compiles segments with the same settings."""

    openvino: Any
    core: Any
    precision: Precision
    threads: int

    def compile(self, content: bytes, spec: SegmentSpec, *, takes_images: bool) -> Any:
        """Compile a segment; segment 1 takes float32 images in place of features."""
        settings = {
            "INFERENCE_PRECISION_HINT": self.precision.hint,
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # it would pin two processes to the same processor
        }
        try:
            model = self._with_feature_types(self.core.read_model(content), spec, takes_images)
            return self.core.compile_model(model, "CPU", settings)
        except Exception as error:  # openvino raises RuntimeError for nearly everything
            raise BackendError(f"openvino cannot load {spec.file}: {error}") from error

    def _with_feature_types(self, model: Any, spec: SegmentSpec, takes_images: bool) -> Any:
        changed = self.openvino.preprocess.PrePostProcessor(model)
        features = getattr(self.openvino.Type, self.precision.features)
        for tensor in spec.inputs:
            changed.input(tensor.name).tensor().set_element_type(self.openvino.Type.f32 if takes_images else features)
        for tensor in spec.outputs[:-1]:
            changed.output(tensor.name).tensor().set_element_type(features)
        return changed.build()


class _Model:
    """A compiled model. Inputs and outputs are in the order of the manifest."""

    def __init__(
        self, openvino: Any, compiled: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], file: str
    ) -> None:
        self._openvino, self._compiled, self._file = openvino, compiled, file
        self._inputs = [_index(compiled.inputs, tensor.name, file) for tensor in inputs]
        self._outputs = [_index(compiled.outputs, tensor.name, file) for tensor in outputs]
        self._rows = [_row(compiled.outputs[i], file) for i in self._outputs]
        self._idle: deque[Any] = deque()  # infer requests; `pop` and `append` are atomic

    def run(self, carried: HostCarried) -> list[NDArray[Any]]:
        """The outputs, in new arrays."""
        # The next call overwrites OpenVINO's own output buffers, so it writes into arrays of ours.
        arrays = [np.empty((carried.rows, *shape), dtype) for shape, dtype in self._rows]
        try:
            request = self._idle.pop() if self._idle else self._compiled.create_infer_request()
        except IndexError:  # another thread took the last one
            request = self._compiled.create_infer_request()
        self._set_tensors(request, carried.arrays, arrays)
        self._infer(request)
        self._idle.append(request)
        return arrays

    def buffers(self) -> Buffers:
        return [np.zeros((1, *shape), dtype) for shape, dtype in self._rows]

    def bind(self, inputs: Buffers, outputs: Buffers) -> Callable[[], None]:
        request = self._compiled.create_infer_request()
        self._set_tensors(request, inputs, outputs)
        return lambda: self._infer(request)

    def _set_tensors(self, request: Any, inputs: Sequence[NDArray[Any]], outputs: Sequence[NDArray[Any]]) -> None:
        try:
            for i, array in zip(self._inputs, inputs, strict=True):
                request.set_input_tensor(i, self._tensor(array))
            for i, array in zip(self._outputs, outputs, strict=True):
                request.set_output_tensor(i, self._tensor(array))
        except Exception as error:  # openvino raises RuntimeError for nearly everything
            raise BackendError(f"openvino failed in {self._file}: {error}") from error

    def _infer(self, request: Any) -> None:
        try:
            request.infer(share_outputs=True, decode_strings=False)
        except Exception as error:  # openvino raises RuntimeError for nearly everything
            raise BackendError(f"openvino failed in {self._file}: {error}") from error

    def _tensor(self, array: NDArray[Any]) -> Any:
        """A tensor that shares the memory of an array."""
        if array.dtype == _NUMPY_TYPES["bf16"]:
            return self._openvino.Tensor(array, self._openvino.Shape(array.shape), self._openvino.Type.bf16)
        return self._openvino.Tensor(array, shared_memory=True)


class OpenVinoSegment(Segment):
    """One compiled segment."""

    def __init__(self, compiler: _Compiler, content: bytes, spec: SegmentSpec, *, takes_images: bool) -> None:
        self.compiled = compiler.compile(content, spec, takes_images=takes_images)
        self._model = _Model(compiler.openvino, self.compiled, spec.inputs, spec.outputs, spec.file)

    def run(self, carried: HostCarried) -> tuple[HostCarried, NDArray[np.float32]]:
        *features, logits = self._model.run(carried)
        return HostCarried(features), logits

    def buffers(self) -> Buffers:
        return self._model.buffers()

    def bind(self, inputs: Buffers, outputs: Buffers) -> Callable[[], None]:
        return self._model.bind(inputs, outputs)


class OpenVinoBackend:
    """All segments of one variant of a bundle in OpenVINO."""

    engine = "openvino"

    def __init__(self, bundle: Bundle, threads: int = 1, precision: str = "fp32") -> None:
        """Compile all segments.

        Args:
            bundle: an opened bundle.
            threads: number of threads of each segment; segments run one after the other.
            precision: a name in `PRECISIONS`.

        Raises:
            UsageError: less than one thread.
            MissingExtra: openvino is not installed.
            BackendError: it cannot load a segment, or would compute in another precision.
        """
        check_threads(threads)
        openvino = load_openvino()
        self.precision, self.variant = precision, PRECISIONS[precision].variant
        compiler = _Compiler(openvino, openvino.Core(), PRECISIONS[precision], threads)
        specs = bundle.manifest.variants[self.variant].segments
        segments = [
            OpenVinoSegment(compiler, bundle.segment(self.variant, k), spec, takes_images=k == 1)
            for k, spec in enumerate(specs, start=1)
        ]
        refuse_other_precision(precision, set().union(*(_layer_precisions(one.compiled) for one in segments)))
        self._bundle, self._compiler = bundle, compiler
        self.segments: Sequence[Segment] = segments
        self.runners = RunnerPool.of(segments, bundle.manifest.input.shape)

    @cached_property
    def static(self) -> OpenVinoSegment | None:
        spec = self._bundle.manifest.variants[self.variant].static
        if spec is None:
            return None
        segment = OpenVinoSegment(self._compiler, self._bundle.static(self.variant), spec, takes_images=True)
        refuse_other_precision(self.precision, _layer_precisions(segment.compiled))
        return segment

    @cached_property
    def static_runners(self) -> RunnerPool | None:
        return None if self.static is None else RunnerPool.of([self.static], self._bundle.manifest.input.shape)

    def carry(self, images: NDArray[np.float32]) -> HostCarried:
        return HostCarried([np.require(images, requirements=("C", "W"))])  # openvino refuses read-only memory


def load_openvino() -> Any:
    """Import openvino. Raises `MissingExtra`."""
    try:
        import openvino
    except ImportError:
        raise missing_extra("openvino", "openvino", "The backend openvino") from None
    return openvino


def refuse_other_precision(precision: str, used: Collection[str]) -> None:
    """Compare the precision that was asked for with those of the compiled layers. Raises `BackendError`."""
    wanted = PRECISIONS[precision]
    matching = wanted.expected & set(used)
    if not matching or (wanted.only and set(used) - wanted.expected):
        raise BackendError(
            f"openvino was asked for {precision} and compiled {', '.join(sorted(used)) or 'nothing'} on this "
            "processor: choose another precision, such as --backend openvino, or --backend ort"
        )


def _layer_precisions(compiled: Any) -> set[str]:
    """The precisions of the multiplying layers, by the execution graph of a compiled model."""
    precisions = set()
    for layer in compiled.get_runtime_model().get_ordered_ops():
        info = layer.get_rt_info()
        if "layerType" in info and info["layerType"].astype(str) in MULTIPLYING_LAYERS:
            precisions.add(info["runtimePrecision"].astype(str))
    return precisions


def _index(ports: Any, name: str, file: str) -> int:
    for i, port in enumerate(ports):
        if name in port.get_names():
            return i
    raise BackendError(f"{file} has no tensor '{name}', which bundle.json names")


def _row(port: Any, file: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of one row of an output."""
    _, *sizes = port.get_partial_shape()
    dtype = _NUMPY_TYPES.get(port.get_element_type().get_type_name())
    if any(size.is_dynamic for size in sizes) or dtype is None:
        raise BackendError(f"{file}: openvino needs float32 outputs of fixed size per row, found {port}")
    return tuple(size.get_length() for size in sizes), dtype
