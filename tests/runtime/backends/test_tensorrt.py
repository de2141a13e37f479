"""Carried features in device memory, tested on host memory, where addresses and sizes are the same."""

from __future__ import annotations

import ctypes
import gc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mexit.errors import BackendError
from mexit.runtime.backends.base import HostCarried
from mexit.runtime.backends.tensorrt import DeviceArray, DeviceCarried, find_gpu


class HostMemory:
    """`tensorrt.Memory` in host memory; a copy outside the allocated blocks fails."""

    def __init__(self) -> None:
        self.blocks: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.copies = 0

    def allocate(self, nbytes: int) -> int:
        block = ctypes.create_string_buffer(b"\xff" * nbytes, nbytes)
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def release(self, address: int) -> None:
        del self.blocks[address]

    def upload(self, address: int, array: np.ndarray) -> None:
        self._copy(address, array.ctypes.data, array.nbytes, self._holds(address, array.nbytes))

    def download(self, array: np.ndarray, address: int) -> None:
        self._copy(array.ctypes.data, address, array.nbytes, self._holds(address, array.nbytes))

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self.copies += 1
        self._copy(target, source, nbytes, self._holds(target, nbytes) and self._holds(source, nbytes))

    def _copy(self, target: int, source: int, nbytes: int, inside: bool) -> None:
        assert inside
        ctypes.memmove(target, source, nbytes)

    def _holds(self, address: int, nbytes: int) -> bool:
        return any(start <= address and address + nbytes <= start + len(block) for start, block in self.blocks.items())


def on_device(memory: HostMemory, arrays: list[np.ndarray]) -> DeviceCarried:
    copies = []
    for array in arrays:
        copies.append(DeviceArray(memory, array.shape, array.dtype))
        memory.upload(copies[-1].address, array)
    return DeviceCarried(copies)


def features(rows: int, seed: int) -> list[np.ndarray]:
    """Two features of different shapes and types, as MSDNet has them."""
    random = np.random.default_rng(seed)
    return [
        random.random((rows, 3, 2, 2), np.float32),
        random.integers(0, 999, (rows, 5)).astype(np.float16),
    ]


def assert_same(carried: DeviceCarried, expected: HostCarried) -> None:
    assert (carried.rows, carried.nbytes) == (expected.rows, expected.nbytes)
    for one, other in zip(carried.arrays, expected.arrays, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one.to_host(), other)


@given(st.integers(1, 70).flatmap(lambda rows: st.tuples(st.just(rows), st.lists(st.integers(0, rows - 1)))))
def test_take_equals_that_of_the_host(drawn: tuple[int, list[int]]) -> None:
    rows, taken = drawn
    arrays, index = features(rows, rows), np.array(taken, np.intp)
    assert_same(on_device(HostMemory(), arrays).take(index), HostCarried(arrays).take(index))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_concat_equals_that_of_the_host(sizes: list[int]) -> None:
    memory = HostMemory()
    parts = [features(rows, seed) for seed, rows in enumerate(sizes)]
    first, *others = [on_device(memory, part) for part in parts]
    host, *host_others = [HostCarried(part) for part in parts]
    assert_same(first.concat(others), host.concat(host_others))


def test_consecutive_rows_are_copied_together() -> None:
    memory = HostMemory()
    carried = on_device(memory, features(64, 0)[:1])
    carried.take(np.array([0, 1, 2, 10, 11, 5, 4], np.intp))
    assert memory.copies == 4


def test_memory_is_released_with_the_last_reference() -> None:
    memory = HostMemory()
    carried = on_device(memory, features(8, 0))
    taken = carried.take(np.array([1, 2], np.intp))
    del carried
    gc.collect()
    assert len(memory.blocks) == 2
    assert_same(taken, HostCarried(features(8, 0)).take(np.array([1, 2])))
    del taken
    gc.collect()
    assert not memory.blocks


def test_without_a_gpu_the_error_names_an_engine_that_needs_none() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU here")
    with pytest.raises(BackendError, match=r"no NVIDIA GPU can be used here .*--backend ort runs on the CPU"):
        find_gpu()
