"""OpenVINO on CPU: one compiled model a segment, batch dynamic.

Left to itself OpenVINO computes a float32 graph in bfloat16 wherever the processor can, so the precision is
always set, and what was compiled is read back. One compiled model serves every batch size: compaction leaves any
number of rows, and kernels made for one size round differently in bfloat16 (measured: a model for each size is
8 to 17 % faster at batch 1 and 8, lost in the noise at 64). One stream: calls from several threads take turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.bundle import Bundle
from mexit.core.manifest import SegmentSpec, TensorSpec
from mexit.errors import BackendError, UsageError, missing_extra
from mexit.runtime.backends.base import HostCarried, Segment
from mexit.runtime.backends.bound_runner import BoundRunner, Buffers, RunnerPool
from mexit.runtime.backends.head_removal import without_outputs

MULTIPLIERS = frozenset({"Convolution", "FullyConnected", "MatMul"})  # layers whose precision is the engine's


@dataclass(frozen=True)
class Precision:
    """One way to compute.

    Attributes:
        variant: whose segments are compiled.
        hint: what float layers are asked to compute in.
        found: how the execution graph names it; at least one multiplying layer must be among these.
        only: whether every multiplying layer must.
        features: the type of carried features. Layers that compute in bfloat16 lose nothing by it, and spare the
            way to float32 and back at every cut (small-cnn, 64 rows: three fifths of the time).
    """

    variant: str
    hint: str
    found: frozenset[str]
    only: bool
    features: str = "f32"


PRECISIONS = {
    "fp32": Precision("fp32", "f32", frozenset({"f32"}), only=True),
    "bf16": Precision("fp32", "bf16", frozenset({"bf16"}), only=False, features="bf16"),
    "int8": Precision("int8", "f32", frozenset({"u8", "i8"}), only=False),
}
_HELD_AS: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(np.uint16),
}  # numpy has no bfloat16: its bits


class _Model:
    """A compiled model and its tensors. Inputs and outputs are positional, as the manifest lists them."""

    def __init__(
        self, runtime: Any, compiled: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], file: str
    ) -> None:
        self._runtime, self._compiled, self._file = runtime, compiled, file
        self._inputs = [_place(compiled.inputs, tensor.name, file) for tensor in inputs]
        self._outputs = [_place(compiled.outputs, tensor.name, file) for tensor in outputs]
        self._rows = [_row(compiled.outputs[place], file) for place in self._outputs]
        self._idle: deque[Any] = deque()  # requests; its pop and append are atomic

    def run(self, carried: HostCarried) -> list[NDArray[Any]]:
        """The outputs, in arrays that nobody else holds."""
        # OpenVINO's own output buffers are overwritten by the next call: it writes into arrays that are handed out
        arrays = [np.empty((carried.rows, *shape), dtype) for shape, dtype in self._rows]
        try:
            request = self._idle.pop() if self._idle else self._compiled.create_infer_request()
        except IndexError:  # another thread took the last one
            request = self._compiled.create_infer_request()
        try:
            for place, array in zip(self._inputs, carried.arrays, strict=True):
                request.set_input_tensor(place, self._shared(array))
            for place, array in zip(self._outputs, arrays, strict=True):
                request.set_output_tensor(place, self._shared(array))
            request.infer(share_outputs=True, decode_strings=False)
        except Exception as error:  # openvino raises RuntimeError for nearly everything
            raise BackendError(f"openvino failed in {self._file}: {error}") from error
        self._idle.append(request)
        return arrays

    def buffers(self) -> Buffers:
        """See `walk.Bindable.buffers`."""
        return [np.zeros((1, *shape), dtype) for shape, dtype in self._rows]

    def bind(self, taken: Buffers, given: Buffers) -> Callable[[], None]:
        """See `walk.Bindable.bind`."""
        request = self._compiled.create_infer_request()

        def call() -> None:
            try:
                request.infer(share_outputs=True, decode_strings=False)
            except Exception as error:  # openvino raises RuntimeError for nearly everything
                raise BackendError(f"openvino failed in {self._file}: {error}") from error

        try:
            for place, array in zip(self._inputs, taken, strict=True):
                request.set_input_tensor(place, self._shared(array))
            for place, array in zip(self._outputs, given, strict=True):
                request.set_output_tensor(place, self._shared(array))
        except Exception as error:
            raise BackendError(f"openvino failed in {self._file}: {error}") from error
        return call

    def _shared(self, array: NDArray[Any]) -> Any:
        """A tensor in the memory of an array."""
        if array.dtype == _HELD_AS["bf16"]:
            return self._runtime.Tensor(array, self._runtime.Shape(array.shape), self._runtime.Type.bf16)
        return self._runtime.Tensor(array, shared_memory=True)


class OpenVinoSegment:
    """A compiled segment, and the same one without its head, compiled when that is first asked for."""

    def __init__(self, runtime: Any, compiled: Any, spec: SegmentSpec, headless: Callable[[], Any]) -> None:
        self._whole = _Model(runtime, compiled, spec.inputs, spec.outputs, spec.file)
        self.compiled, self._runtime, self._spec, self._compile_headless = compiled, runtime, spec, headless

    @cached_property
    def _headless(self) -> _Model:
        spec = self._spec
        return _Model(self._runtime, self._compile_headless(), spec.inputs, spec.outputs[:-1], spec.file)

    def run(self, carried: HostCarried) -> tuple[HostCarried, NDArray[np.float32]]:
        """See `base.Segment.run`."""
        *features, logits = self._whole.run(carried)
        return HostCarried(features), logits

    def features(self, carried: HostCarried) -> HostCarried:
        """See `base.Segment.features`."""
        return HostCarried(self._headless.run(carried))

    def buffers(self) -> Buffers:
        """See `walk.Bindable.buffers`."""
        return self._whole.buffers()

    def bind(self, taken: Buffers, given: Buffers) -> Callable[[], None]:
        """See `walk.Bindable.bind`."""
        model = self._whole if len(given) == len(self._spec.outputs) else self._headless
        return model.bind(taken, given)


class OpenVinoBackend:
    """Every segment of one variant of a bundle in OpenVINO."""

    engine = "openvino"
    drops_heads = True

    def __init__(self, bundle: Bundle, threads: int = 1, precision: str = "fp32") -> None:
        """Compile all segments.

        Args:
            bundle: an opened, hence checked, bundle.
            threads: of each segment; segments run one after the other, so this many are busy at a time.
            precision: one of `PRECISIONS`.

        Raises:
            MissingExtra: openvino is not installed.
            BackendError: it cannot load a segment, or would compute in another precision.
        """
        if threads < 1:
            raise UsageError(f"threads must be at least 1, found {threads}")
        runtime = load_openvino()
        wanted = PRECISIONS[precision]
        self.precision, self.variant = precision, wanted.variant
        core = runtime.Core()
        opened: list[OpenVinoSegment] = []
        used: set[str] = set()
        for k, spec in enumerate(bundle.manifest.variants[self.variant].segments, start=1):
            content = bundle.segment(self.variant, k)
            carries = wanted.features if k > 1 else "f32", wanted.features  # segment 1 takes the image
            compiled = _compile(core, content, spec, threads, wanted.hint, carries)
            used |= _used_precisions(compiled)
            headless = partial(_compile_headless, core, content, spec, threads, wanted.hint, carries)
            opened.append(OpenVinoSegment(runtime, compiled, spec, headless))
        refuse_other_precision(precision, used)
        shape = (1, *bundle.manifest.input.shape)
        self.segments: list[Segment] = [*opened]
        self.walks = RunnerPool(lambda: BoundRunner(np.zeros(shape, np.float32), opened))

    def carry(self, images: NDArray[np.float32]) -> HostCarried:
        """See `base.Backend.carry`."""
        return HostCarried([np.require(images, requirements=("C", "W"))])  # openvino refuses read-only memory


def load_openvino() -> Any:
    """Import openvino, or say what to type."""
    try:
        import openvino
    except ImportError:
        raise missing_extra("openvino", "openvino", "The backend openvino") from None
    return openvino


def refuse_other_precision(precision: str, used: Collection[str]) -> None:
    """Raise `BackendError` if these precisions, as the execution graph names them, are not what was asked for."""
    wanted = PRECISIONS[precision]
    fitting = wanted.found & set(used)
    if not fitting or (wanted.only and set(used) - wanted.found):
        raise BackendError(
            f"openvino was asked for {precision} and compiled {', '.join(sorted(used)) or 'nothing'} on this "
            "processor: choose another precision, such as --backend openvino, or --backend ort"
        )


def _compile(
    core: Any, content: bytes, spec: SegmentSpec, threads: int, hint: str, carries: tuple[str, str]
) -> Any:
    """`carries`: the types of the features that come in and go out."""
    settings = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # two processes would be tied to the same core
    }
    try:
        model = core.read_model(content)
        return core.compile_model(_with_features(model, spec, *carries), "CPU", settings)
    except Exception as error:  # openvino raises RuntimeError for nearly everything
        raise BackendError(f"openvino cannot load {spec.file}: {error}") from error


def _with_features(model: Any, spec: SegmentSpec, taken: str, given: str) -> Any:
    """The model with carried features of these types."""
    runtime = load_openvino()
    changed = runtime.preprocess.PrePostProcessor(model)
    present = {name for port in model.outputs for name in port.get_names()}
    for tensor in spec.inputs:
        changed.input(tensor.name).tensor().set_element_type(getattr(runtime.Type, taken))
    for tensor in spec.outputs:
        if tensor.name in present and tensor.name != spec.outputs[-1].name:
            changed.output(tensor.name).tensor().set_element_type(getattr(runtime.Type, given))
    return changed.build()


def _compile_headless(
    core: Any, content: bytes, spec: SegmentSpec, threads: int, hint: str, carries: tuple[str, str]
) -> Any:
    pruned = without_outputs(content, [spec.outputs[-1].name], spec.file)
    return _compile(core, pruned, spec, threads, hint, carries)


def _used_precisions(compiled: Any) -> set[str]:
    """In what the multiplying layers of a compiled model compute, as its execution graph says."""
    found = set()
    for layer in compiled.get_runtime_model().get_ordered_ops():
        about = layer.get_rt_info()
        if "layerType" in about and about["layerType"].astype(str) in MULTIPLIERS:
            found.add(about["runtimePrecision"].astype(str))
    return found


def _place(ports: Any, name: str, file: str) -> int:
    for place, port in enumerate(ports):
        if name in port.get_names():
            return place
    raise BackendError(f"{file} has no tensor '{name}', which bundle.json names")


def _row(port: Any, file: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of one row of an output."""
    _, *sides = port.get_partial_shape()
    dtype = _HELD_AS.get(port.get_element_type().get_type_name())
    if any(side.is_dynamic for side in sides) or dtype is None:
        raise BackendError(f"{file}: openvino needs float32 outputs of fixed size per row, found {port}")
    return tuple(side.get_length() for side in sides), dtype
