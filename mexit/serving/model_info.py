"""Metadata of the server and of its model, as JSON values."""

from __future__ import annotations

import json
from typing import Any

from mexit.core import versions
from mexit.runtime.runtime import Runtime
from mexit.serving.limits import Limits
from mexit.serving.oip import INPUT_DATATYPE, OUTPUTS, VERSION

PLATFORM = "onnx_onnxv1"
EXTENSIONS = ("binary_tensor_data", "parameters", "schedule_policy", "statistics", "model_configuration")


def server_metadata() -> dict[str, Any]:
    """The answer to `GET /v2`."""
    return {"name": "mexit", "version": versions.VERSION, "extensions": list(EXTENSIONS)}


def model_metadata(runtime: Runtime, name: str) -> dict[str, Any]:
    """The answer to `GET /v2/models/{m}`. The protocol wants flat parameters, so lists are JSON texts."""
    manifest = runtime.bundle.manifest
    inputs = [{"name": manifest.input.name, "datatype": INPUT_DATATYPE, "shape": [-1, *manifest.input.shape]}]
    outputs = [
        {"name": output_name, "datatype": output.datatype, "shape": [-1, *_row_shape(runtime, output_name)]}
        for output_name, output in OUTPUTS.items()
    ]
    return {
        "name": name,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": inputs,
        "outputs": outputs,
        "parameters": {
            "mexit_model": runtime.bundle.id,
            "mexit_budget": runtime.budget.text,
            "mexit_budget_unit": "macs" if runtime.timing is None else "time",
            "mexit_exits": json.dumps(manifest.numbers),
            "mexit_exit_macs": json.dumps(manifest.cumulative_macs),
            "mexit_static_macs": int(manifest.costs.static),
            "mexit_classes": json.dumps(manifest.classes),
        },
    }


def model_config(runtime: Runtime, name: str, limits: Limits) -> dict[str, Any]:
    """The answer to `GET /v2/models/{m}/config`, in Triton's terms. Dimensions leave out the batch."""
    manifest = runtime.bundle.manifest
    inputs = [{"name": manifest.input.name, "data_type": "TYPE_FP32", "dims": list(manifest.input.shape)}]
    outputs = [
        {"name": output_name, "data_type": f"TYPE_{output.datatype}", "dims": _row_shape(runtime, output_name) or [1]}
        for output_name, output in OUTPUTS.items()
    ]
    return {
        "name": name,
        "platform": PLATFORM,
        "backend": runtime.backend.engine,
        "max_batch_size": limits.rows,
        "input": inputs,
        "output": outputs,
    }


def repository_index(name: str, ready: bool) -> list[dict[str, str]]:
    """The answer to `POST /v2/repository/index`."""
    state, reason = ("READY", "") if ready else ("UNAVAILABLE", "the server is stopping")
    return [{"name": name, "version": VERSION, "state": state, "reason": reason}]


def _row_shape(runtime: Runtime, name: str) -> list[int]:
    return [len(runtime.bundle.manifest.classes)] if OUTPUTS[name].per_class else []
