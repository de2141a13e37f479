"""The engines, by the names that a user types: `ENGINE` or `ENGINE:PRECISION`.

The module of an engine is imported when the engine is opened, so its package need not be installed for the others.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from mexit.core.bundle import Bundle
from mexit.errors import UsageError
from mexit.runtime.backends.base import Backend

AUTO = "auto"


@dataclass(frozen=True)
class Engine:
    """An engine with a precision.

    Attributes:
        engine, precision, variant: the key of its entry in `policies.json`.
        opener: "module:class" in this package, called with (bundle, threads, precision).
        builds: whether opening may first build engines for the device, which can take minutes; such an engine
            manages its own threads.
    """

    engine: str
    precision: str
    variant: str
    opener: str
    builds: bool = False


ENGINES = {
    "ort": Engine("ort", "fp32", "fp32", "ort:OrtBackend"),
    "ort:int8": Engine("ort", "int8", "int8", "ort:OrtBackend"),
    "openvino": Engine("openvino", "fp32", "fp32", "openvino:OpenVinoBackend"),
    "openvino:bf16": Engine("openvino", "bf16", "fp32", "openvino:OpenVinoBackend"),
    "openvino:int8": Engine("openvino", "int8", "int8", "openvino:OpenVinoBackend"),
    "trt": Engine("trt", "fp32", "fp32", "tensorrt:TrtBackend", builds=True),
    "trt:fp16": Engine("trt", "fp16", "fp16", "tensorrt:TrtBackend", builds=True),
    "trt:int8": Engine("trt", "int8", "int8", "tensorrt:TrtBackend", builds=True),
}


def find(name: str) -> Engine:
    """The engine of that name. Raises `UsageError` with all names."""
    if name not in ENGINES:
        raise UsageError(f"unknown backend '{name}': choose from {', '.join((AUTO, *ENGINES))}")
    return ENGINES[name]


def name_of(engine: str, precision: str, variant: str) -> str | None:
    """The name of an engine by its key in `policies.json`; None if this version has no such engine."""
    key = (engine, precision, variant)
    return next((name for name, one in ENGINES.items() if (one.engine, one.precision, one.variant) == key), None)


def open_backend(bundle: Bundle, name: str, threads: int = 1) -> Backend:
    """Load every segment of a bundle.

    Args:
        bundle: an opened bundle.
        name: a name in `ENGINES`, or "auto" for ONNX Runtime.
        threads: number of threads of the engine.

    Raises:
        UsageError: no such engine, or the bundle has no segments for it.
        MissingExtra: its package is not installed.
        BackendError: it cannot load a segment.
    """
    engine = find("ort" if name == AUTO else name)
    if engine.variant not in bundle.manifest.variants:
        raise UsageError(
            f"{bundle.path} has no {engine.variant} segments, which backend {name} runs: "
            f"export the run again with --precision {engine.variant}"
        )
    module, _, class_name = engine.opener.partition(":")
    opener = getattr(importlib.import_module(f"mexit.runtime.backends.{module}"), class_name)
    backend: Backend = opener(bundle, threads, engine.precision)
    return backend
