"""Tries one native library in a process of its own: it may print, hang or crash without taking the doctor along.

The process is told `providers`, `engine NAME` or `openvino` and prints one JSON object. The network is a bundle of
one exit, 245 bytes of ONNX that need no onnx package.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mexit.core.atomic_io import sha256_bytes
from mexit.core.bundle import Bundle
from mexit.core.manifest import (
    FORMAT,
    VERSION,
    ExitSpec,
    InputSpec,
    Manifest,
    PrepareSpec,
    SegmentSpec,
    TensorSpec,
    Variant,
)
from mexit.errors import MexitError
from mexit.runtime.backends.ort import load_onnxruntime
from mexit.runtime.backends.registry import open_backend

_MODULE = "mexit.flows.doctor.probe"
TIMEOUT_S = 60.0
# Flatten and MatMul, opset 17: x (N, 1, 4, 4) float32 to y (N, 2), the mean of x twice.
TINY_ONNX = (
    b'\x08\x08:\xea\x01\n\x0f\n\x01x\x12\x01f"\x07Flatten\n\x11\n\x01f\n\x01w\x12\x01y"\x06MatMul\x12\x01g*\x8c\x01'
    b"\x08\x10\x08\x02\x10\x01B\x01wJ\x80\x01" + 32 * b"\x00\x00\x80\x3d" +  # 1/16 in float32
    b"Z\x1c\n\x01x\x12\x17\n\x15\x08\x01\x12\x11\n\x03\x12\x01N\n\x02\x08\x01\n\x02\x08\x04\n\x02\x08\x04"
    b"b\x14\n\x01y\x12\x0f\n\r\x08\x01\x12\t\n\x03\x12\x01N\n\x02\x08\x02B\x04\n\x00\x10\x11"
)  # fmt: skip
ROWS, IDLE_S = 20_000, 0.2


def ask(*arguments: str) -> dict[str, Any]:
    """Run a probe; what it printed, or {"failed": why}. Never raises for what the library does."""
    command = [sys.executable, "-c", f"from {_MODULE} import main; main()", *arguments]
    with tempfile.TemporaryDirectory() as folder:  # for what engines keep; nothing is imported from it
        environment = {**os.environ, "MEXIT_CACHE": folder}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, env=environment,
                cwd=folder, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"failed": f"no answer within {TIMEOUT_S:.0f} s"}
        except OSError as error:
            return {"failed": f"a process for it cannot be started: {error}"}
    if done.returncode < 0:
        return {"failed": f"the process was ended by signal {-done.returncode}"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        return {"failed": lines[-1].strip()}
    return found


def tiny_bundle() -> Bundle:
    """A bundle in memory with fp32 segments alone: one exit, two classes."""
    file, digest = "segments/fp32/1.onnx", sha256_bytes(TINY_ONNX)
    given, logits = TensorSpec("x", (-1, 1, 4, 4), "float32"), TensorSpec("y", (-1, 2), "float32")
    segment = SegmentSpec(file, digest, len(TINY_ONNX), (given,), (logits,))
    spec = InputSpec("x", "float32", "NCHW", 1, (4, 4), (0.0, 1.0), PrepareSpec())
    exits, variants = (ExitSpec(32, 0, 32, 32),), {"fp32": Variant((segment,), None)}
    manifest = Manifest(FORMAT, VERSION, "tiny", ("0", "1"), spec, exits, variants, None, (), {})
    return Bundle.from_parts(Path("tiny"), manifest, {file: TINY_ONNX})


def providers() -> dict[str, Any]:
    """Which of onnxruntime's execution providers are listed, and which a session really has."""
    runtime = load_onnxruntime()
    listed = [name for name in runtime.get_available_providers() if name != "AzureExecutionProvider"]
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    real = [name for name in listed if _loads(runtime, options, name)]
    return {"version": runtime.__version__, "listed": listed, "real": real}


def _loads(runtime: Any, options: Any, provider: str) -> bool:
    try:
        return provider in runtime.InferenceSession(TINY_ONNX, options, providers=[provider]).get_providers()
    except Exception:  # onnxruntime raises classes of its own C++ module
        return False


def engine(name: str) -> dict[str, Any]:
    """Open an engine with two threads, compare its answer, and see whether it rests when it has nothing to do."""
    opened = open_backend(tiny_bundle(), name, 2)
    images = np.full((ROWS, 1, 4, 4), 0.5, np.float32)
    for _ in range(20):
        _, logits = opened.segments[0].run(opened.carry(images))
    time.sleep(0.001)
    before = time.process_time()
    time.sleep(IDLE_S)
    idle_s = time.process_time() - before
    return {"right": bool(np.allclose(logits, 0.5, atol=0.01)), "idle_s": idle_s}


def openvino() -> dict[str, Any]:
    """In which precision OpenVINO computes here unless it is told."""
    package = importlib.import_module("openvino")

    core = package.Core()
    hint = core.get_property("CPU", "INFERENCE_PRECISION_HINT")
    name = getattr(hint, "get_type_name", hint.__str__)()
    return {"version": package.__version__, "hint": str(name), "devices": list(core.available_devices)}


PROBES: Mapping[str, Any] = {"providers": providers, "engine": engine, "openvino": openvino}


def main() -> None:
    """Run the probe that the command line names."""
    name, *arguments = sys.argv[1:]
    try:
        found = PROBES[name](*arguments)
    except MexitError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    sys.stdout.write(f"\n{json.dumps(found)}\n")
