"""What the server says of itself and of its model: plain values, ready for JSON."""

from __future__ import annotations

import json
from typing import Any

from mexit.core import versions
from mexit.runtime.runtime import Runtime
from mexit.serving.limits import Limits
from mexit.serving.oip import VERSION
from mexit.serving.oip_tensors import INPUT_DATATYPE, OUTPUTS

PLATFORM = "onnx_onnxv1"
EXTENSIONS = ("binary_tensor_data", "parameters", "schedule_policy", "statistics", "model_configuration")


def server() -> dict[str, Any]:
    """Answer to `GET /v2`."""
    return {"name": "mexit", "version": versions.VERSION, "extensions": list(EXTENSIONS)}


def model(runtime: Runtime) -> dict[str, Any]:
    """Answer to `GET /v2/models/{m}`; the parameters are flat, as the protocol wants them."""
    manifest = runtime.bundle.manifest
    inputs = [{"name": manifest.input.name, "datatype": INPUT_DATATYPE, "shape": [-1, *manifest.input.shape]}]
    outputs = [
        {"name": name, "datatype": output.datatype, "shape": [-1, *_row(runtime, name)]}
        for name, output in OUTPUTS.items()
    ]
    parameters = {
        "mexit_model": runtime.bundle.id,
        "mexit_budget": runtime.budget.text,
        "mexit_exit_macs": json.dumps(manifest.cumulative_macs),
        "mexit_classes": json.dumps(manifest.classes),
    }
    described = {"name": manifest.name, "versions": [VERSION], "platform": PLATFORM}
    return {**described, "inputs": inputs, "outputs": outputs, "parameters": parameters}


def config(runtime: Runtime, limits: Limits) -> dict[str, Any]:
    """Answer to `GET /v2/models/{m}/config`, in Triton's words; dimensions leave out the batch."""
    manifest = runtime.bundle.manifest
    inputs = [{"name": manifest.input.name, "data_type": "TYPE_FP32", "dims": list(manifest.input.shape)}]
    outputs = [
        {"name": name, "data_type": f"TYPE_{output.datatype}", "dims": _row(runtime, name) or [1]}
        for name, output in OUTPUTS.items()
    ]
    described = {"name": manifest.name, "platform": PLATFORM, "backend": runtime.backend.engine}
    return {**described, "max_batch_size": limits.rows, "input": inputs, "output": outputs}


def index(runtime: Runtime, ready: bool) -> list[dict[str, str]]:
    """Answer to `POST /v2/repository/index`."""
    state, reason = ("READY", "") if ready else ("UNAVAILABLE", "the server is stopping")
    return [{"name": runtime.bundle.manifest.name, "version": VERSION, "state": state, "reason": reason}]


def _row(runtime: Runtime, name: str) -> list[int]:
    return [len(runtime.bundle.manifest.classes)] if OUTPUTS[name].per_class else []
