"""Arrays in GPU memory and the little that is done to them there: take rows, concatenate, copy to and from a host.

Everything goes through one CUDA stream, so that allocations, copies and kernels happen in the order of the calls,
whichever thread makes them. The arithmetic of `DeviceCarried` is tested over host memory; `CudaMemory` was never
run by the project.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mexit.errors import BackendError, missing_extra


class Memory(Protocol):
    """Where device arrays live. Addresses and sizes are in bytes."""

    def allocate(self, nbytes: int) -> int:
        """The address of new memory, aligned to 256 bytes."""

    def release(self, address: int) -> None:
        """Give it back once everything asked for so far is done."""

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """A contiguous host array to the device; the array may change afterwards."""

    def download(self, array: NDArray[Any], address: int) -> None:
        """Fill a contiguous host array from the device; it is complete on return."""

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Within the device."""


class DeviceArray:
    """A contiguous array in device memory, given back when nobody holds it.

    Attributes:
        memory: where it lives.
        shape, dtype, address: as of a numpy array.
    """

    __slots__ = ("__weakref__", "address", "dtype", "memory", "shape")

    def __init__(self, memory: Memory, shape: Sequence[int], dtype: DTypeLike) -> None:
        self.memory = memory
        self.shape = tuple(shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.address = memory.allocate(max(1, self.nbytes))
        weakref.finalize(self, memory.release, self.address).atexit = False  # the end of the process frees it

    @property
    def nbytes(self) -> int:
        return self.row_bytes * self.shape[0]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def to_host(self) -> NDArray[Any]:
        """A copy in host memory."""
        found = np.empty(self.shape, self.dtype)
        self.memory.download(found, self.address)
        return found


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
        return DeviceCarried([_gather(array, rows) for array in self.arrays])

    def concat(self, others: Sequence[DeviceCarried]) -> DeviceCarried:
        everyone = (self, *others)
        return DeviceCarried([_join(parts) for parts in zip(*(one.arrays for one in everyone), strict=True)])


@dataclass(frozen=True)
class Gpu:
    """The GPU at hand: its name, compute capability ("8.6") and what its driver supports of CUDA ("13.0")."""

    name: str
    capability: str
    driver: str

    def __str__(self) -> str:
        return f"{self.capability} {self.name}, driver for CUDA {self.driver}"


class CudaMemory:
    """GPU memory by `cuda.bindings.runtime`, on one stream.

    Attributes:
        stream: the stream's handle as a number, for engines that are to share it.
        gpu: whose memory it is.
    """

    def __init__(self) -> None:
        """Raises `MissingExtra` without cuda-bindings, `BackendError` without a GPU or its driver."""
        self._cuda, self.gpu = find_gpu()
        self.stream = int(self._call("cudaStreamCreate"))

    def allocate(self, nbytes: int) -> int:
        """See `Memory`."""
        return int(self._call("cudaMallocAsync", nbytes, self.stream))

    def release(self, address: int) -> None:
        """See `Memory`."""
        self._cuda.cudaFreeAsync(address, self.stream)

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """See `Memory`."""
        self._copy(address, array.ctypes.data, array.nbytes, "HostToDevice")
        self._wait()

    def download(self, array: NDArray[Any], address: int) -> None:
        """See `Memory`."""
        self._copy(array.ctypes.data, address, array.nbytes, "DeviceToHost")
        self._wait()

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """See `Memory`."""
        self._copy(target, source, nbytes, "DeviceToDevice")

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        kind = getattr(self._cuda.cudaMemcpyKind, f"cudaMemcpy{kind}")
        self._call("cudaMemcpyAsync", target, source, nbytes, kind, self.stream)

    def _wait(self) -> None:
        self._call("cudaStreamSynchronize", self.stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        return _call(self._cuda, name, *arguments)


def find_gpu() -> tuple[Any, Gpu]:
    """The CUDA runtime and the first GPU. Raises `MissingExtra`, `BackendError`."""
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
    found, driver = _call(runtime, "cudaGetDeviceProperties", 0), _call(runtime, "cudaDriverGetVersion")
    name = found.name.decode(errors="replace").rstrip("\0")
    return runtime, Gpu(name, f"{found.major}.{found.minor}", f"{driver // 1000}.{driver % 1000 // 10}")


def _call(runtime: Any, name: str, *arguments: Any) -> Any:
    """The result of a CUDA function, which returns its error first. Raises `BackendError`."""
    error, *results = getattr(runtime, name)(*arguments)
    if error != runtime.cudaError_t.cudaSuccess:
        _, text = runtime.cudaGetErrorString(error)
        raise BackendError(f"CUDA: {name}: {text.decode()}")
    return results[0] if results else None


def _gather(array: DeviceArray, rows: NDArray[np.intp]) -> DeviceArray:
    found = DeviceArray(array.memory, (len(rows), *array.shape[1:]), array.dtype)
    size = array.row_bytes
    for place, first, count in _runs(rows):
        array.memory.copy(found.address + place * size, array.address + first * size, count * size)
    return found


def _join(parts: Sequence[DeviceArray]) -> DeviceArray:
    first = parts[0]
    found = DeviceArray(first.memory, (sum(part.shape[0] for part in parts), *first.shape[1:]), first.dtype)
    address = found.address
    for part in parts:
        if part.nbytes:
            first.memory.copy(address, part.address, part.nbytes)
        address += part.nbytes
    return found


def _runs(rows: NDArray[np.intp]) -> Iterator[tuple[int, int, int]]:
    """Neighbours are copied at once: (place in `rows`, first row, how many)."""
    starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    for start, end in zip(starts, np.append(starts[1:], len(rows)), strict=len(rows) > 0):
        yield int(start), int(rows[start]), int(end - start)
