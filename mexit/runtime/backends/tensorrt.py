"""TensorRT: one engine a segment; features stay on the GPU, only logits come back.

Engines are taken from this device's cache, or built from the bundle's ONNX segments and kept there (`trt_cache`).

No part of this file that needs a GPU was ever run by the project; `tests/gpu` is what to run first on one.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.bundle import Bundle
from mexit.core.manifest import SegmentSpec
from mexit.errors import BackendError, UsageError
from mexit.runtime.backends.base import Segment
from mexit.runtime.backends.tensorrt_builder import (
    BATCHES,
    CAPABILITIES,
    EngineConfig,
    TensorRT,
    build,
    check_tensors,
    load_tensorrt,
    logger,
    tensor_spec,
)
from mexit.runtime.backends.tensorrt_cache import Engine, Slot, provide, slot
from mexit.runtime.backends.tensorrt_memory import (
    CudaMemory,
    DeviceArray,
    DeviceCarried,
    Gpu,
    find_gpu,
)

MOST_ROWS = BATCHES[-1]


class TrtSegment:
    """One engine with one execution context, which serves one call at a time."""

    def __init__(self, context: Any, spec: SegmentSpec, memory: CudaMemory, turn: threading.Lock) -> None:
        self._context = context
        self._spec = spec
        self._memory = memory
        self._turn = turn

    def run(self, carried: DeviceCarried) -> tuple[DeviceCarried, NDArray[np.float32]]:
        """See `base.Segment.run`. More rows than the engine was built for are run in parts."""
        if carried.rows <= MOST_ROWS:
            return self._run(carried)
        order = np.arange(carried.rows)
        starts = range(0, carried.rows, MOST_ROWS)
        (first, _), *others = parts = [self._run(carried.take(order[i : i + MOST_ROWS])) for i in starts]
        return first.concat([features for features, _ in others]), np.concatenate([one for _, one in parts])

    def features(self, carried: DeviceCarried) -> DeviceCarried:
        """See `base.Segment.features`: engines are built whole, so the head runs too."""
        return self.run(carried)[0]

    def _run(self, carried: DeviceCarried) -> tuple[DeviceCarried, NDArray[np.float32]]:
        spec, rows = self._spec, carried.rows
        outputs = [DeviceArray(self._memory, (rows, *one.shape[1:]), one.dtype) for one in spec.outputs]
        with self._turn:
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
    """Every segment of one variant of a bundle in TensorRT, on the first GPU."""

    engine = "trt"
    drops_heads = False

    def __init__(self, bundle: Bundle, threads: int = 1, precision: str = "fp32") -> None:
        """Load all engines; those that are missing or stale are built first, which takes seconds or more.

        Args:
            bundle: an opened, hence checked, bundle.
            threads: of other engines; the GPU has its own.
            precision: also the name of the variant whose segments are loaded; it lies in their graphs.

        Raises:
            MissingExtra: TensorRT or cuda-bindings is not installed.
            BackendError: there is no GPU, or TensorRT cannot build or open an engine for it.
            Untrusted, Damaged: an engine in the cache is not what this device put there.
        """
        if threads < 1:
            raise UsageError(f"threads must be at least 1, found {threads}")
        tensorrt = load_tensorrt()
        self._memory = CudaMemory()
        self.precision = self.variant = precision
        self._runtime = tensorrt.module.Runtime(logger(tensorrt.module))
        self._runtime.engine_host_code_allowed = False
        recipe, turn = recipe_for(tensorrt, precision, self._memory.gpu), threading.Lock()
        self._specs = bundle.manifest.variants[self.variant].segments
        self.segments: list[Segment] = []
        for k, spec in enumerate(self._specs, start=1):
            context = self._context(tensorrt, provide_engine(bundle, tensorrt, recipe, k))
            self.segments.append(TrtSegment(context, spec, self._memory, turn))

    def carry(self, images: NDArray[np.float32]) -> DeviceCarried:
        """See `base.Backend.carry`."""
        host = np.ascontiguousarray(images, np.dtype(self._specs[0].inputs[0].dtype))
        array = DeviceArray(self._memory, host.shape, host.dtype)
        self._memory.upload(array.address, host)
        return DeviceCarried([array])

    def _context(self, tensorrt: TensorRT, engine: Engine) -> Any:
        """Open a checked plan, and check what came out of it."""
        spec, gpu = self._specs[engine.record.segment - 1], self._memory.gpu
        log = logger(tensorrt.module)
        log.errors.clear()
        opened = self._runtime.deserialize_cuda_engine(engine.plan)
        if opened is None:
            raise BackendError(
                f"{tensorrt.package} cannot open the engine of {spec.file}, built for "
                f"{', '.join(engine.record.targets)}, on this GPU, {gpu}: {log.last_error}"
            )
        names = [opened.get_tensor_name(i) for i in range(opened.num_io_tensors)]
        found = [tensor_spec(name, opened.get_tensor_shape(name), opened.get_tensor_dtype(name)) for name in names]
        check_tensors(found, (*spec.inputs, *spec.outputs), f"the engine of {spec.file}")
        return opened.create_execution_context()


def recipe_for(tensorrt: TensorRT, precision: str, gpu: Gpu | None = None) -> EngineConfig:
    """What engines are built with here. Raises as `find_gpu` where the package builds for the GPU at hand."""
    targets = CAPABILITIES if tensorrt.ahead_of_time else (str(gpu or find_gpu()[1]),)
    return EngineConfig(tensorrt.package, tensorrt.version, targets, BATCHES, precision)


def provide_engine(
    bundle: Bundle,
    tensorrt: TensorRT,
    recipe: EngineConfig,
    segment: int,
    *,
    replace_it: bool = False,
    trusted: Slot | None = None,
) -> Engine:
    """The engine of a segment (from 1) of the variant named as the precision; see `trt_cache.provide`."""
    variant = recipe.precision
    spec = bundle.manifest.variants[variant].segments[segment - 1]
    content = bundle.segment(variant, segment)
    place = slot(bundle, tensorrt.package, variant, segment)
    making = partial(build, tensorrt, content, spec, recipe)
    return provide(place, recipe, making, replace_it=replace_it, trusted=trusted)
