"""Probes of native libraries for `mexit doctor`, each in a subprocess, because a library may hang or crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mexit.core.bundle import Bundle
from mexit.errors import MexitError, MissingExtra
from mexit.runtime.backends.ort import load_onnxruntime
from mexit.runtime.backends.registry import open_backend

# One exit: the mean of a 1 x 4 x 4 image as both of two logits.
TEST_BUNDLE = Path(__file__).with_name("doctor_bundle")
TIMEOUT_S = 60.0


def run_probe(*arguments: str, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Run a probe of `PROBES` in a subprocess.

    Args:
        arguments: name of the probe, and its arguments.
        timeout_s: seconds after which the subprocess is killed.

    Returns:
        The JSON object that the probe printed, or {"failed": reason} when it raised, crashed or hung.
    """
    command = [sys.executable, "-c", f"from {__name__} import main; main()", *arguments]
    with tempfile.TemporaryDirectory() as folder:  # the cache of the engines; as working directory it hides no module
        environment = {**os.environ, "MEXIT_CACHE": folder}
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                env=environment,
                cwd=folder,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"no answer within {timeout_s:.0f} s"}
        except OSError as error:
            return {"failed": f"its subprocess cannot be started: {error}"}
    if done.returncode < 0:
        return {"failed": f"its subprocess was ended by signal {-done.returncode}"}
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        return {"failed": lines[-1].strip()}
    return answer


def main() -> None:
    """Run the probe that the command line names, and print its answer as the last line."""
    name, *arguments = sys.argv[1:]
    try:
        answer = PROBES[name](*arguments)
    except MissingExtra as error:
        answer = {"missing": str(error), "failed": str(error)}
    except MexitError as error:
        answer = {"failed": str(error), "explained": True}
    sys.stdout.write(f"\n{json.dumps(answer)}\n")


def _probe_torch() -> dict[str, Any]:
    import torch

    return {"cuda": torch.version.cuda, "available": torch.cuda.is_available()}


def _probe_providers() -> dict[str, Any]:
    onnxruntime = load_onnxruntime()
    listed = [name for name in onnxruntime.get_available_providers() if name != "AzureExecutionProvider"]
    model = str(TEST_BUNDLE / "segments/fp32/1.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    loaded = []
    for name in listed:
        try:
            session = onnxruntime.InferenceSession(model, options, providers=[name])
        except Exception:  # the C++ module raises its own classes
            continue
        loaded += [name] if name in session.get_providers() else []
    return {
        "listed": [name.removesuffix("ExecutionProvider") for name in listed],
        "loaded": [name.removesuffix("ExecutionProvider") for name in loaded],
    }


def _probe_engine(name: str) -> dict[str, Any]:
    backend = open_backend(Bundle.open(TEST_BUNDLE), name)
    images = np.full((8, 1, 4, 4), 0.5, np.float32)
    _, logits = backend.segments[0].run(backend.carry(images))
    return {"right": bool(np.allclose(logits, 0.5, atol=0.01))}


PROBES: Mapping[str, Callable[..., dict[str, Any]]] = {
    "torch": _probe_torch,
    "providers": _probe_providers,
    "engine": _probe_engine,
}
