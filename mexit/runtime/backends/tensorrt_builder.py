"""Builds TensorRT engines from ONNX segments, and keeps them in the device cache.

`tensorrt` 10 and 11 build for the GPU of this machine. `tensorrt_rtx` builds ahead of time for several generations of
GPUs and needs none. Networks are strongly typed, so the precision of an engine is that of its graph, and TF32 is off.

An engine is kept in `<device cache>/engines/<package>/<variant>/<k>/`:

    engine.plan   the engine; opening it runs code in it, so only a checked one is opened
    engine.json   its `Record`, signed with HMAC-SHA256 and the key of this device

Forging an engine needs the key; write access to the cache is not enough. An engine that came with a bundle is taken
only if the user trusts it.

Of the two packages the project has run only `tensorrt_rtx`, and only on machines without a GPU.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

from mexit.core.atomic_io import new_directory, read_bytes, read_json, sha256_bytes, to_json, write_bytes
from mexit.core.bundle import MAX_FILE_BYTES, Bundle
from mexit.core.manifest import SegmentSpec, TensorSpec
from mexit.core.printable import shell_path
from mexit.core.schema import check_format, decode
from mexit.errors import BackendError, Damaged, NotFound, SchemaTooNew, Untrusted, missing_extra
from mexit.runtime.device_cache import cache_folder, device_key, make_private

PACKAGES = ("tensorrt", "tensorrt_rtx")
BATCHES = (1, 8, 64)  # smallest, typical and largest batch of a call
# Turing, Ampere, Ada and Blackwell; TensorRT for RTX lacks Hopper.
CAPABILITIES: tuple[str, ...] = ("7.5", "8.6", "8.9", "12.0")

FORMAT, VERSION = "mexit-engine", 2
ENGINES, PLAN, RECORD = "engines", "engine.plan", "engine.json"
_DTYPES = {"FLOAT": "float32", "HALF": "float16"}  # other types keep their name, in lower case
_BUILDING = threading.Lock()  # TensorRT has one logger per process, so builds run one at a time


@dataclass(frozen=True)
class TensorRT:
    """An imported TensorRT package: `tensorrt` or `tensorrt_rtx`."""

    module: Any
    package: str
    version: str

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds for GPUs that this machine does not have."""
        return self.package == "tensorrt_rtx"


@dataclass(frozen=True)
class EngineConfig:
    """Everything that an engine is built with, besides its graph.

    Attributes:
        builder, builder_version: the package; no other version opens the engine.
        targets: compute capabilities, or the one GPU, with its driver, that the engine is built on.
        batches: smallest, typical and largest batch.
        precision: precision of the graph.
    """

    builder: str
    builder_version: str
    targets: tuple[str, ...]
    batches: tuple[int, ...]
    precision: str


@dataclass(frozen=True)
class Record:
    """What an engine is: the content of `engine.json`.

    Attributes:
        format, version: format of the record.
        model, variant, segment: bundle id, variant, and segment (from 1) that the engine runs.
        onnx_sha256: SHA-256 of the ONNX bytes that it was built from.
        config: see `EngineConfig`.
        plan_sha256, plan_bytes: SHA-256 and size of the plan.
        seconds: duration of the build.
        signature: HMAC-SHA256 of all other fields, hexadecimal.
    """

    format: str
    version: int
    model: str
    variant: str
    segment: int
    onnx_sha256: str
    config: EngineConfig
    plan_sha256: str
    plan_bytes: int
    seconds: float
    signature: str

    def sign(self, key: bytes) -> str:
        """The signature of this record under a key."""
        return hmac.new(key, to_json(asdict(replace(self, signature=""))), hashlib.sha256).hexdigest()

    def staleness(self, config: EngineConfig, onnx_sha256: str) -> str:
        """The reason why the engine must be built again, in words; empty if it need not be."""
        if self.onnx_sha256 != onnx_sha256:
            return "built from another segment"
        then, now = asdict(self.config), asdict(config)
        return ", ".join(f"{name} was {then[name]}, is {now[name]}" for name in then if then[name] != now[name])


@dataclass(frozen=True)
class EngineSlot:
    """The folder of one engine.

    Attributes:
        folder: holds `engine.plan` and `engine.json`.
        bundle, variant, segment: the segment (from 1) that the engine runs.
    """

    folder: Path
    bundle: Bundle
    variant: str
    segment: int

    @property
    def spec(self) -> SegmentSpec:
        """The segment in the manifest."""
        return self.bundle.manifest.variants[self.variant].segments[self.segment - 1]

    @property
    def remedy(self) -> str:
        """The command that repairs the cache."""
        return f"mexit export {shell_path(self.bundle.path)} --trt --replace builds all engines anew"


@dataclass(frozen=True)
class Engine:
    """A checked engine; `origin` is "cached", "built" just now, or "adopted" from the bundle."""

    record: Record
    plan: bytes
    origin: str


def load_tensorrt() -> TensorRT:
    """Import `tensorrt`, else `tensorrt_rtx`. Raises `MissingExtra` if neither is installed."""
    for package in PACKAGES:
        try:
            module = importlib.import_module(package)
        except (ImportError, OSError):  # bindings without their libraries raise either
            continue
        return TensorRT(module, package, str(module.__version__))
    raise missing_extra("tensorrt", "trt", "Building TensorRT engines")


def engine_config(tensorrt: TensorRT, precision: str, gpu: str) -> EngineConfig:
    """The configuration for a precision; `gpu` is the target of a package that does not build ahead of time."""
    # TensorRT for RTX has no float32 matrix products for Turing, and the logits of fp32 and int8 graphs need one.
    targets = CAPABILITIES if precision == "fp16" else CAPABILITIES[1:]
    targets = targets if tensorrt.ahead_of_time else (gpu,)
    return EngineConfig(tensorrt.package, tensorrt.version, targets, BATCHES, precision)


def build(tensorrt: TensorRT, content: bytes, spec: SegmentSpec, config: EngineConfig) -> bytes:
    """Build the engine of one segment; returns the plan.

    The build runs in its own thread, because TensorRT would swallow a `KeyboardInterrupt` in its Python callbacks.

    Args:
        tensorrt: from `load_tensorrt`.
        content: the ONNX file.
        spec: inputs and outputs of the segment, which the parsed graph must have.
        config: see `EngineConfig`.

    Raises:
        BackendError: TensorRT cannot read the graph (the message names the node) or cannot build it.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(_build, tensorrt, content, spec, config, stop).result()
        finally:
            stop.set()


def cache_slot(bundle: Bundle, package: str, variant: str, segment: int) -> EngineSlot:
    """The place of an engine in the device cache."""
    folder = cache_folder(bundle.id) / ENGINES / package / variant / str(segment)
    return EngineSlot(folder, bundle, variant, segment)


def provide(
    slot: EngineSlot,
    tensorrt: TensorRT,
    config: EngineConfig,
    *,
    rebuild: bool = False,
    trusted: EngineSlot | None = None,
    build_plan: Callable[[TensorRT, bytes, SegmentSpec, EngineConfig], bytes] = build,
) -> Engine:
    """Return the engine of a slot; build and store it if there is none or it is stale.

    Args:
        slot: from `cache_slot`.
        tensorrt: from `load_tensorrt`.
        config: an engine with another configuration is stale.
        rebuild: build without reading the cache.
        trusted: an engine of the bundle that the user trusts; taken, and signed with the key of this device, before
            one is built.
        build_plan: builds the plan.

    Raises:
        Untrusted, Damaged: the stored engine was not signed by this device, or was changed; see `load`.
        BackendError: the engine cannot be built.
        MexitError: the cache cannot be written.
    """
    for source, key, origin in ((None if rebuild else slot, device_key(), "cached"), (trusted, None, "adopted")):
        if source is None:
            continue
        with suppress(NotFound):
            record, plan = load(source, key)
            if not record.staleness(config, slot.spec.sha256):
                record = record if origin == "cached" else store(slot, record, plan)
                return Engine(record, plan, origin)
    start = perf_counter()
    plan = build_plan(tensorrt, slot.bundle.segment(slot.variant, slot.segment), slot.spec, config)
    record = Record(
        FORMAT, VERSION, slot.bundle.id, slot.variant, slot.segment, slot.spec.sha256, config,
        sha256_bytes(plan), len(plan), perf_counter() - start, "",
    )  # fmt: skip
    return Engine(store(slot, record, plan), plan, "built")


def load(slot: EngineSlot, key: bytes | None) -> tuple[Record, bytes]:
    """Read and check an engine. The returned plan is the bytes that were checked.

    Args:
        slot: its place.
        key: key of this device; None does not check the signature, for an engine that the user trusts.

    Raises:
        NotFound: there is no engine, or one of an older format.
        Untrusted: the signature is not of this key, or the engine is of another segment.
        Damaged: a file is not what was written.
        SchemaTooNew: a newer mexit wrote it.
    """
    path = slot.folder / RECORD
    try:
        value = read_json(path, "engine record")
        check_format(value, FORMAT, VERSION, str(path))
        if value["version"] != VERSION:
            raise NotFound(f"{path} has an older format")
        record: Record = decode(value, Record, str(path))
    except (Damaged, SchemaTooNew) as error:
        raise type(error)(f"{error}: {slot.remedy}") from None
    if key is not None and not hmac.compare_digest(record.signature, record.sign(key)):
        raise Untrusted(
            f"{path} was changed, or was not written by this device, so its engine is not opened, which would "
            f"run code in it: {slot.remedy}"
        )
    stored = (record.model, record.variant, record.segment)
    expected = (slot.bundle.id, slot.variant, slot.segment)
    if stored != expected:
        raise Untrusted(f"{path} is {_segment_name(*stored)}, expected is {_segment_name(*expected)}: {slot.remedy}")
    plan = read_bytes(slot.folder / PLAN, "engine", MAX_FILE_BYTES)
    if len(plan) != record.plan_bytes or sha256_bytes(plan) != record.plan_sha256:
        raise Damaged(
            f"{slot.folder / PLAN} was changed: its sha256 is not the recorded one, so it is not opened: {slot.remedy}"
        )
    return record, plan


def store(slot: EngineSlot, record: Record, plan: bytes) -> Record:
    """Write an engine, signed with the key of this device; returns the signed record."""
    record = replace(record, signature=record.sign(device_key()))
    with suppress(OSError):  # the write reports a folder that cannot be made
        make_private(cache_folder(slot.bundle.id))
    with new_directory(slot.folder, replace=True) as temporary:
        write_bytes(temporary / PLAN, plan)
        write_bytes(temporary / RECORD, to_json(asdict(record)))
    return record


def check_tensors(tensors: Sequence[TensorSpec], expected: Sequence[TensorSpec], name: str) -> None:
    """Compare names, shapes and types, in any order. Raises `BackendError` with both lists."""
    if sorted(tensors, key=lambda one: one.name) != sorted(expected, key=lambda one: one.name):
        has, says = (
            ", ".join(f"{one.name} {one.dtype} {one.shape}" for one in side) or "nothing"
            for side in (tensors, expected)
        )
        raise BackendError(f"{name} has {has}, the bundle says {says}")


def tensor_spec(name: str, shape: Sequence[int], dtype: Any) -> TensorSpec:
    """A `TensorSpec` from TensorRT's description of a tensor."""
    return TensorSpec(name, tuple(shape), _DTYPES.get(dtype.name, dtype.name.lower()))


@cache
def logger(module: Any) -> Any:
    """TensorRT's logger of this process; it prints nothing and keeps the last error in `last_error`."""

    class Logger(module.ILogger):  # type: ignore[misc]  # the base class is known at run time only
        last_error = "it gives no reason"

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                self.last_error = message

    return Logger()


def build_settings(tensorrt: TensorRT, builder: Any, network: Any, config: EngineConfig) -> Any:
    """TensorRT's builder configuration for a network."""
    module, settings = tensorrt.module, builder.create_builder_config()
    settings.clear_flag(module.BuilderFlag.TF32)  # float32 engines share their thresholds
    # A row must not depend on the other rows of its batch.
    settings.set_flag(module.BuilderFlag.DISTRIBUTIVE_INDEPENDENCE)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        profile.set_shape(tensor.name, *((rows, *tuple(tensor.shape)[1:]) for rows in config.batches))
    settings.add_optimization_profile(profile)
    if tensorrt.ahead_of_time:
        settings.num_compute_capabilities = len(config.targets)
        for i, target in enumerate(config.targets):
            capability = getattr(module.ComputeCapability, f"SM{target.replace('.', '')}")
            settings.set_compute_capability(capability, i)
    return settings


def parse_network(tensorrt: TensorRT, builder: Any, content: bytes, spec: SegmentSpec) -> Any:
    """TensorRT's network from ONNX bytes. Raises `BackendError` if it cannot be read or has other tensors."""
    module, log = tensorrt.module, logger(tensorrt.module)
    # Version 11 has strongly typed networks only, and accepts the flag.
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, log)
    if not parser.parse(content):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = [f"node '{one.node_name()}' ({one.node_operator()}): {one.desc()}" for one in errors]
        raise BackendError(f"TensorRT cannot read {spec.file}: {'; '.join(reasons) or log.last_error}")
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    for tensors, expected in ((inputs, spec.inputs), (outputs, spec.outputs)):
        parsed = [tensor_spec(one.name, one.shape, one.dtype) for one in tensors]
        check_tensors(parsed, expected, f"{spec.file}, as TensorRT reads it,")
    return network


def _build(tensorrt: TensorRT, content: bytes, spec: SegmentSpec, config: EngineConfig, stop: threading.Event) -> bytes:
    log = logger(tensorrt.module)
    with _BUILDING:
        log.last_error = "it gives no reason"
        try:
            builder = tensorrt.module.Builder(log)
        except TypeError:  # raised if there is no builder, for example without a GPU
            raise BackendError(f"{tensorrt.package} cannot build here: {log.last_error}") from None
        network = parse_network(tensorrt, builder, content, spec)
        settings = build_settings(tensorrt, builder, network, config)
        settings.progress_monitor = _stop_monitor(tensorrt.module, stop)
        plan = builder.build_serialized_network(network, settings)
    if plan is None:
        raise BackendError(f"{tensorrt.package} cannot build {spec.file}: {log.last_error}")
    return bytes(plan)


def _stop_monitor(module: Any, stop: threading.Event) -> Any:
    """A progress monitor that ends the build once `stop` is set."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # the base class is known at run time only
        def phase_start(self, *_: Any) -> None:
            pass

        phase_finish = phase_start

        def step_complete(self, *_: Any) -> bool:
            return not stop.is_set()

    return Monitor()


def _segment_name(model: str, variant: str, segment: int) -> str:
    return f"the engine of segment {segment}, {variant}, model {model[:12]}"
