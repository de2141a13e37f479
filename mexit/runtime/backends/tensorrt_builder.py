"""Building TensorRT engines: ONNX bytes of one segment to the bytes of a plan.

One file for `tensorrt` 10 and 11, which build for the GPU at hand, and for `tensorrt_rtx`, which builds ahead of
time for several generations of GPUs and needs none itself. Precision lies in the graph alone (networks are
strongly typed), so an engine is never in another precision than its name says; TF32 is off for the same reason.

Only `tensorrt_rtx` was run by the project, without a GPU.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from mexit.core.bundle import MAX_FILE_BYTES
from mexit.core.manifest import SegmentSpec, TensorSpec
from mexit.errors import BackendError, missing_extra

PACKAGES = ("tensorrt", "tensorrt_rtx")
AHEAD_OF_TIME = "tensorrt_rtx"
# Fewest, usual and most rows of a call; more rows are run in several calls.
BATCHES = (1, 8, 64)
# Turing, Ampere, Ada and Blackwell; TensorRT for RTX has no Hopper.
CAPABILITIES: tuple[str, ...] = ("7.5", "8.6", "8.9", "12.0")
# TensorRT for RTX refuses float32 matrix products on it, so engines of most fp32 graphs do without.
TURING = "7.5"
BUILD_LIMIT_S = 1800.0
_DTYPES = {"FLOAT": "float32", "HALF": "float16"}  # others by their own name in lower case: int8, int64, ...
# TensorRT keeps one logger a process, whichever comes first; builds that share it take turns.
_BUILDING = threading.Lock()


@dataclass(frozen=True)
class TensorRT:
    """An imported TensorRT: `tensorrt` or `tensorrt_rtx`."""

    module: Any
    package: str
    version: str

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds for other GPUs than the one at hand."""
        return self.package == AHEAD_OF_TIME


@dataclass(frozen=True)
class EngineConfig:
    """What an engine was built with; another recipe is another engine.

    Attributes:
        builder, builder_version: the package; a plan opens in no other.
        targets: compute capabilities asked for; or the one GPU, with its driver, that it was built on.
        batches: fewest, usual and most rows.
        precision: of the graph.
    """

    builder: str
    builder_version: str
    targets: tuple[str, ...]
    batches: tuple[int, ...]
    precision: str


@dataclass(frozen=True)
class Built:
    """A plan, those of the recipe's targets that it is for, and how long it took."""

    plan: bytes
    targets: tuple[str, ...]
    seconds: float


def load_tensorrt() -> TensorRT:
    """Import TensorRT, or TensorRT for RTX where the former is not there. Raises `MissingExtra`."""
    for package in PACKAGES:
        try:
            module = importlib.import_module(package)
        except (ImportError, OSError):  # bindings without their libraries fail with either
            continue
        return TensorRT(module, package, str(module.__version__))
    raise missing_extra("tensorrt", "trt", "Building TensorRT engines")


def build(
    tensorrt: TensorRT, content: bytes, spec: SegmentSpec, recipe: EngineConfig, limit_s: float = BUILD_LIMIT_S
) -> Built:
    """Build the engine of one segment.

    Args:
        tensorrt: from `load_tensorrt`.
        content: the ONNX file, as it was hashed.
        spec: what goes in and out, which the graph as TensorRT reads it is held against.
        recipe: see there.
        limit_s: seconds after which the build is given up.

    Raises:
        BackendError: TensorRT cannot read the graph (the node is named) or build it, or takes too long.
    """
    begin = time.perf_counter()
    try:
        plan, targets = _build(tensorrt, content, spec, recipe, limit_s), recipe.targets
    except BackendError:
        targets = tuple(target for target in recipe.targets if target != TURING)
        left_s = limit_s - (time.perf_counter() - begin)
        if targets in ((), recipe.targets) or left_s <= 0:
            raise
        plan = _build(tensorrt, content, spec, replace(recipe, targets=targets), left_s)
    return Built(plan, targets, time.perf_counter() - begin)


def check_tensors(found: Sequence[TensorSpec], expected: Sequence[TensorSpec], what: str) -> None:
    """Hold names, shapes and types against the bundle's, in any order. Raises `BackendError` with both."""
    if sorted(found, key=lambda one: one.name) != sorted(expected, key=lambda one: one.name):
        raise BackendError(f"{what} has {_say(found)}, the bundle says {_say(expected)}")


def tensor_spec(name: str, shape: Sequence[int], dtype: Any) -> TensorSpec:
    """A tensor as TensorRT describes it, in the bundle's words."""
    return TensorSpec(name, tuple(shape), _DTYPES.get(dtype.name, dtype.name.lower()))


@cache
def logger(module: Any) -> Any:
    """The process's one TensorRT logger: prints nothing, keeps the errors in `errors`."""

    class Logger(module.ILogger):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        @property
        def last_error(self) -> str:
            return self.errors[-1] if self.errors else "it gives no reason"

    return Logger()


def _build(tensorrt: TensorRT, content: bytes, spec: SegmentSpec, recipe: EngineConfig, limit_s: float) -> bytes:
    """Build in a thread of its own: TensorRT calls back, and swallows a Ctrl-C that is raised in such a call."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(_plan, tensorrt, content, spec, recipe, stop)
        try:
            return work.result(limit_s)
        except OutOfTime:
            raise BackendError(f"building took longer than the {limit_s:.3g} s it may and was given up") from None
        finally:
            stop.set()


def _plan(
    tensorrt: TensorRT, content: bytes, spec: SegmentSpec, recipe: EngineConfig, stop: threading.Event
) -> bytes:
    log = logger(tensorrt.module)
    with _BUILDING:
        log.errors.clear()
        try:
            builder = tensorrt.module.Builder(log)
        except TypeError:  # how the bindings say that there is none, such as for want of a GPU
            raise BackendError(f"{tensorrt.package} cannot build here: {log.last_error}") from None
        network = _network(tensorrt.module, builder, content, spec, log)
        config = builder.create_builder_config()
        _configure(tensorrt.module, builder, network, config, recipe)
        if tensorrt.ahead_of_time:
            _aim(tensorrt.module, config, recipe.targets)
        config.progress_monitor = _monitor(tensorrt.module, stop)
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendError(f"{tensorrt.package} cannot build {spec.file}: {log.last_error}")
    if not 0 < plan.nbytes <= MAX_FILE_BYTES:
        raise BackendError(f"{tensorrt.package} built {plan.nbytes} bytes from {spec.file}, which is no engine")
    return bytes(plan)


def _network(module: Any, builder: Any, content: bytes, spec: SegmentSpec, log: Any) -> Any:
    # Version 11 knows strongly typed networks only and takes the flag all the same.
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, log)
    if not parser.parse(content):
        found = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        raise BackendError(f"TensorRT cannot read {spec.file}: {'; '.join(found) or log.last_error}")
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    for side, expected in ((inputs, spec.inputs), (outputs, spec.outputs)):
        found_specs = [tensor_spec(one.name, one.shape, one.dtype) for one in side]
        check_tensors(found_specs, expected, f"{spec.file}, as TensorRT reads it,")
    return network


def _configure(module: Any, builder: Any, network: Any, config: Any, recipe: EngineConfig) -> None:
    config.clear_flag(module.BuilderFlag.TF32)  # thresholds of fp32 are shared by engines that compute in it
    # No row's answer may depend on who shares its batch.
    config.set_flag(module.BuilderFlag.DISTRIBUTIVE_INDEPENDENCE)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        profile.set_shape(tensor.name, *((rows, *tuple(tensor.shape)[1:]) for rows in recipe.batches))
    config.add_optimization_profile(profile)


def _aim(module: Any, config: Any, targets: Sequence[str]) -> None:
    """The compute capabilities of an engine built ahead of time."""
    config.num_compute_capabilities = len(targets)
    for place, target in enumerate(targets):
        config.set_compute_capability(getattr(module.ComputeCapability, f"SM{target.replace('.', '')}"), place)


def _monitor(module: Any, stop: threading.Event) -> Any:
    """Tells TensorRT to give up once `stop` is set."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # the base is known at run time only
        def phase_start(self, *_: Any) -> None:
            pass

        def step_complete(self, *_: Any) -> bool:
            return not stop.is_set()

        def phase_finish(self, *_: Any) -> None:
            pass

    return Monitor()


def _parser_error(error: Any) -> str:
    return f"node '{error.node_name()}' ({error.node_operator()}): {error.desc()}"


def _say(tensors: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{one.name} {one.dtype} {one.shape}" for one in tensors) or "nothing"
