"""Metadata of the server and of its models, as JSON values."""

from __future__ import annotations

import json
from typing import Any

from mexit.core import versions
from mexit.runtime.runtime import Runtime
from mexit.serving.oip import INPUT_DATATYPE, OUTPUTS
from mexit.serving.service import Service

PLATFORM = "onnx_onnxv1"
EXTENSIONS = (
    *("binary_tensor_data", "parameters", "schedule_policy", "statistics", "model_configuration"),
    *("model_repository", "model_repository(unload_dependents)"),
)


def server_metadata() -> dict[str, Any]:
    """The answer to `GET /v2`."""
    return {"name": "mexit", "version": versions.VERSION, "extensions": list(EXTENSIONS)}


def model_metadata(service: Service) -> dict[str, Any]:
    """The answer to `GET /v2/models/{m}`. The protocol wants flat parameters, so lists are JSON texts."""
    runtime = service.runtime
    manifest = runtime.bundle.manifest
    inputs = [{"name": manifest.input.name, "datatype": INPUT_DATATYPE, "shape": [-1, *manifest.input.shape]}]
    outputs = [
        {"name": output_name, "datatype": output.datatype, "shape": [-1, *_row_shape(runtime, output_name)]}
        for output_name, output in OUTPUTS.items()
    ]
    return {
        "name": service.name,
        "versions": [service.version],
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


def model_config(service: Service) -> dict[str, Any]:
    """The answer to `GET /v2/models/{m}/config`, in Triton's terms. Dimensions leave out the batch."""
    runtime = service.runtime
    manifest = runtime.bundle.manifest
    inputs = [{"name": manifest.input.name, "data_type": "TYPE_FP32", "dims": list(manifest.input.shape)}]
    outputs = [
        {"name": output_name, "data_type": f"TYPE_{output.datatype}", "dims": _row_shape(runtime, output_name) or [1]}
        for output_name, output in OUTPUTS.items()
    ]
    return {
        "name": service.name,
        "platform": PLATFORM,
        "backend": runtime.backend.engine,
        "max_batch_size": service.server.limits.rows,
        "input": inputs,
        "output": outputs,
    }


def _row_shape(runtime: Runtime, name: str) -> list[int]:
    return [len(runtime.bundle.manifest.classes)] if OUTPUTS[name].per_class else []
