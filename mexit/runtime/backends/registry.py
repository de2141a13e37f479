"""The engines, by the names that people type: `ENGINE` or `ENGINE:PRECISION`.

An engine's module is imported when it is opened, so none of them needs to be installed for the others.
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
    """One way to run a bundle.

    Attributes:
        engine, precision, variant: the key of its entry in `policies.json`.
        opener: "module:function" below this package, of (bundle, threads, precision) to a `Backend`.
        builds: opening it may first build for this device, which can take minutes; its threads are its own affair.
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
    """The engine of that name. Raises `UsageError` naming all there are."""
    if name not in ENGINES:
        raise UsageError(f"unknown backend '{name}': choose from {', '.join((AUTO, *ENGINES))}")
    return ENGINES[name]


def open_backend(bundle: Bundle, name: str, threads: int = 1) -> Backend:
    """Load every segment of a bundle.

    Args:
        bundle: an opened, hence checked, bundle.
        name: one of `ENGINES`, or "auto".
        threads: of the engine.

    Raises:
        UsageError: no such engine, or the bundle has no segments for it.
        MissingExtra: it is not installed.
        BackendError: it cannot load a segment.
    """
    engine = find("ort" if name == AUTO else name)
    if engine.variant not in bundle.manifest.variants:
        raise UsageError(
            f"{bundle.path} has no {engine.variant} segments, which backend {name} runs: "
            f"export the run again with --precision {engine.variant}"
        )
    module, _, function = engine.opener.partition(":")
    opener = getattr(importlib.import_module(f"mexit.runtime.backends.{module}"), function)
    backend: Backend = opener(bundle, threads, engine.precision)
    return backend
