"""TensorRT on an NVIDIA GPU: one engine per segment. Features stay on the GPU; only logits are copied to the host.

Engines come from the device cache, or are built from the ONNX segments and stored there (`tensorrt_builder`).
All allocations, copies and kernels go through one CUDA stream, so they run in the order of the calls from any thread.

The project has never run this file on a GPU. The arithmetic of `DeviceCarried` is tested on host memory; run
`tests/gpu` first on a machine with a GPU.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mexit.core.bundle import Bundle
from mexit.core.manifest import SegmentSpec
from mexit.core.resource_limits import check_threads
from mexit.errors import BackendError, missing_extra
from mexit.runtime.backends.base import Segment
from mexit.runtime.backends.engine_slot import STATIC, EngineSlot, cache_slot
from mexit.runtime.backends.tensorrt_builder import (
    BATCHES,
    Engine,
    TensorRT,
    check_tensors,
    engine_config,
    load_tensorrt,
    logger,
    provide,
    tensor_spec,
)

MAX_ROWS = BATCHES[-1]


class TrtSegment(Segment):
    """One engine with one execution context, which runs one call at a time."""

    def __init__(self, context: Any, spec: SegmentSpec, memory: CudaMemory, lock: threading.Lock) -> None:
        self._context = context
        self._spec = spec
        self._memory = memory
        self._lock = lock

    def run(self, carried: DeviceCarried) -> tuple[DeviceCarried, NDArray[np.float32]]:
        """Run the segment; more than `MAX_ROWS` rows are run in parts."""
        if carried.rows <= MAX_ROWS:
            return self._run(carried)
        order = np.arange(carried.rows)
        starts = range(0, carried.rows, MAX_ROWS)
        (first, _), *others = parts = [self._run(carried.take(order[i : i + MAX_ROWS])) for i in starts]
        return first.concat([features for features, _ in others]), np.concatenate([logits for _, logits in parts])

    def _run(self, carried: DeviceCarried) -> tuple[DeviceCarried, NDArray[np.float32]]:
        spec, rows = self._spec, carried.rows
        outputs = [DeviceArray(self._memory, (rows, *one.shape[1:]), one.dtype) for one in spec.outputs]
        with self._lock:
            for tensor, array in zip(spec.inputs, carried.arrays, strict=True):
                self._context.set_input_shape(tensor.name, array.shape)
                self._context.set_tensor_address(tensor.name, array.address)
            for tensor, array in zip(spec.outputs, outputs, strict=True):
                self._context.set_tensor_address(tensor.name, array.address)
            if not self._context.execute_async_v3(self._memory.stream):
                raise BackendError(f"TensorRT failed to run {spec.file} on {rows} rows")
        *features, logits = outputs
        return DeviceCarried(features), logits.to_host().astype(np.float32, copy=False)


class TrtBackend:
    """All segments of one variant of a bundle in TensorRT, on the first GPU."""

    engine = "trt"

    def __init__(self, bundle: Bundle, threads: int = 1, precision: str = "fp32") -> None:
        """Load all engines; missing and stale ones are built first, which takes seconds or more.

        Args:
            bundle: an opened bundle.
            threads: not used; other engines run on this number of threads.
            precision: also the name of the variant whose segments are loaded.

        Raises:
            MissingExtra: TensorRT or cuda-bindings is not installed.
            BackendError: there is no GPU, or TensorRT cannot build or open an engine for it.
            Untrusted, Damaged: an engine in the cache is not what this device stored.
        """
        check_threads(threads)
        tensorrt = load_tensorrt()
        self._memory = CudaMemory()
        self.precision = self.variant = precision
        self._runtime = tensorrt.module.Runtime(logger(tensorrt.module))
        self._runtime.engine_host_code_allowed = False
        self._tensorrt, self._config = tensorrt, engine_config(tensorrt, precision, str(self._memory.gpu))
        self._bundle, self._lock = bundle, threading.Lock()
        variant = bundle.manifest.variants[self.variant]
        self._specs = variant.segments
        self.segments: list[Segment] = [self._segment(k) for k in range(1, len(self._specs) + 1)]
        if variant.static is not None:  # a build takes too long for the first request that needs it
            self._provide(STATIC)

    @cached_property
    def static(self) -> Segment | None:
        return None if self._bundle.manifest.variants[self.variant].static is None else self._segment(STATIC)

    def carry(self, images: NDArray[np.float32]) -> DeviceCarried:
        """Copy images (B, C, H, W) float32 in [0, 1] to the GPU."""
        host = np.ascontiguousarray(images, np.dtype(self._specs[0].inputs[0].dtype))
        array = DeviceArray(self._memory, host.shape, host.dtype)
        self._memory.upload(array.address, host)
        return DeviceCarried([array])

    def _segment(self, k: int) -> TrtSegment:
        slot, engine = self._provide(k)
        return TrtSegment(self._open(self._tensorrt, engine, slot.spec), slot.spec, self._memory, self._lock)

    def _provide(self, k: int) -> tuple[EngineSlot, Engine]:
        slot = cache_slot(self._bundle, self._tensorrt.package, self.variant, k)
        return slot, provide(slot, self._tensorrt, self._config)

    def _open(self, tensorrt: TensorRT, engine: Engine, spec: SegmentSpec) -> Any:
        """Open a checked engine and compare its tensors with the bundle's; returns an execution context."""
        log = logger(tensorrt.module)
        log.last_error = "it gives no reason"
        opened = self._runtime.deserialize_cuda_engine(engine.plan)
        if opened is None:
            raise BackendError(
                f"{tensorrt.package} cannot open the engine of {spec.file}, built for "
                f"{', '.join(engine.record.config.targets)}, on this GPU, {self._memory.gpu}: "
                f"{log.last_error}"
            )
        names = [opened.get_tensor_name(i) for i in range(opened.num_io_tensors)]
        specs = [tensor_spec(name, opened.get_tensor_shape(name), opened.get_tensor_dtype(name)) for name in names]
        check_tensors(specs, (*spec.inputs, *spec.outputs), f"the engine of {spec.file}")
        return opened.create_execution_context()


class Memory(Protocol):
    """Device memory. Addresses and sizes are in bytes."""

    def allocate(self, nbytes: int) -> int:
        """Allocate memory, aligned to 256 bytes; returns its address."""

    def release(self, address: int) -> None:
        """Free memory after all earlier calls have completed."""

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy a contiguous host array to the device; the array may change afterwards."""

    def download(self, array: NDArray[Any], address: int) -> None:
        """Copy from the device into a contiguous host array, which is complete on return."""

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy within the device."""


class DeviceArray:
    """A contiguous array in device memory; the memory is released with the last reference.

    Attributes:
        memory: the device memory.
        shape, dtype, address: as of a numpy array.
    """

    __slots__ = ("__weakref__", "address", "dtype", "memory", "shape")

    def __init__(self, memory: Memory, shape: Sequence[int], dtype: DTypeLike) -> None:
        self.memory = memory
        self.shape = tuple(shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.address = memory.allocate(max(1, self.nbytes))
        weakref.finalize(self, memory.release, self.address).atexit = False  # the process frees it at its end

    @property
    def nbytes(self) -> int:
        return self.row_bytes * self.shape[0]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def take(self, rows: NDArray[np.intp]) -> DeviceArray:
        """The given rows; consecutive rows are copied together."""
        result = DeviceArray(self.memory, (len(rows), *self.shape[1:]), self.dtype)
        size = self.row_bytes
        for position, first, count in _runs(rows):
            self.memory.copy(result.address + position * size, self.address + first * size, count * size)
        return result

    def to_host(self) -> NDArray[Any]:
        """A copy in host memory."""
        host = np.empty(self.shape, self.dtype)
        self.memory.download(host, self.address)
        return host


class DeviceCarried:
    """Carried features on the device, each (B, ...); see `base.Carried`."""

    __slots__ = ("arrays",)

    def __init__(self, arrays: Sequence[DeviceArray]) -> None:
        self.arrays = tuple(arrays)

    @property
    def rows(self) -> int:
        return self.arrays[0].shape[0] if self.arrays else 0

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def take(self, rows: NDArray[np.intp]) -> DeviceCarried:
        return DeviceCarried([array.take(rows) for array in self.arrays])

    def concat(self, others: Sequence[DeviceCarried]) -> DeviceCarried:
        parts = zip(*(carried.arrays for carried in (self, *others)), strict=True)
        return DeviceCarried([_concatenate(arrays) for arrays in parts])


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, compute capability ("8.6"), and the CUDA version that its driver supports ("13.0")."""

    name: str
    capability: str
    driver: str

    def __str__(self) -> str:
        return f"{self.capability} {self.name}, driver for CUDA {self.driver}"


class CudaMemory:
    """`Memory` of the first GPU, by `cuda.bindings.runtime`, on one stream.

    Attributes:
        stream: handle of the stream, which the engines share.
        gpu: the GPU.
    """

    def __init__(self) -> None:
        """Raises `MissingExtra` without cuda-bindings, `BackendError` without a GPU or its driver."""
        self._cuda, self.gpu = find_gpu()
        self.stream = int(self._call("cudaStreamCreate"))

    def allocate(self, nbytes: int) -> int:
        return int(self._call("cudaMallocAsync", nbytes, self.stream))

    def release(self, address: int) -> None:
        self._cuda.cudaFreeAsync(address, self.stream)

    def upload(self, address: int, array: NDArray[Any]) -> None:
        self._copy(address, array.ctypes.data, array.nbytes, "HostToDevice")
        self._call("cudaStreamSynchronize", self.stream)

    def download(self, array: NDArray[Any], address: int) -> None:
        self._copy(array.ctypes.data, address, array.nbytes, "DeviceToHost")
        self._call("cudaStreamSynchronize", self.stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._copy(target, source, nbytes, "DeviceToDevice")

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        kind = getattr(self._cuda.cudaMemcpyKind, f"cudaMemcpy{kind}")
        self._call("cudaMemcpyAsync", target, source, nbytes, kind, self.stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        return _call(self._cuda, name, *arguments)


def find_gpu() -> tuple[Any, Gpu]:
    """The CUDA runtime module and the first GPU. Raises `MissingExtra`, `BackendError`."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise missing_extra("cuda-bindings", "trt", "Running TensorRT engines") from None
    try:
        count = _call(runtime, "cudaGetDeviceCount")
    except BackendError as error:
        raise BackendError(f"no NVIDIA GPU can be used here ({error}): --backend ort runs on the CPU") from None
    if not count:
        raise BackendError("there is no NVIDIA GPU here: --backend ort runs on the CPU")
    device, driver = _call(runtime, "cudaGetDeviceProperties", 0), _call(runtime, "cudaDriverGetVersion")
    name = device.name.decode(errors="replace").rstrip("\0")
    return runtime, Gpu(name, f"{device.major}.{device.minor}", f"{driver // 1000}.{driver % 1000 // 10}")


def _call(runtime: Any, name: str, *arguments: Any) -> Any:
    """Call a CUDA function, which returns its error code first. Raises `BackendError`."""
    error, *results = getattr(runtime, name)(*arguments)
    if error != runtime.cudaError_t.cudaSuccess:
        _, text = runtime.cudaGetErrorString(error)
        raise BackendError(f"CUDA: {name}: {text.decode()}")
    return results[0] if results else None


def _concatenate(arrays: Sequence[DeviceArray]) -> DeviceArray:
    first = arrays[0]
    result = DeviceArray(first.memory, (sum(array.shape[0] for array in arrays), *first.shape[1:]), first.dtype)
    address = result.address
    for array in arrays:
        if array.nbytes:
            first.memory.copy(address, array.address, array.nbytes)
        address += array.nbytes
    return result


def _runs(rows: NDArray[np.intp]) -> Iterator[tuple[int, int, int]]:
    """Runs of consecutive rows: (position in `rows`, first row, number of rows)."""
    starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    for start, end in zip(starts, np.append(starts[1:], len(rows)), strict=len(rows) > 0):
        yield int(start), int(rows[start]), int(end - start)
