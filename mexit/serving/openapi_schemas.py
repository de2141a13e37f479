"""The JSON values of requests and responses, as schemas of the OpenAPI description."""

from __future__ import annotations

from typing import Any

from mexit.runtime.prediction import REUSED, UNSURE
from mexit.serving.camera_views import STATES
from mexit.serving.oip import INPUT_DATATYPE, OUTPUTS

Json = dict[str, Any]
_TEXT: Json = {"type": "string"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_NUMBER: Json = {"type": "number"}
_TRUTH: Json = {"type": "boolean"}
_REASONS = ("confident", "last", "deadline", "max-exit", "rate-limit", UNSURE)
_MODEL_STATES = ("READY", "UNAVAILABLE", "LOADING", "UNLOADING")


def _object(fields: Json, optional: tuple[str, ...] = (), **more: Any) -> Json:
    """An object whose other fields are required."""
    required = [name for name in fields if name not in optional]
    return {"type": "object", "properties": fields, **({"required": required} if required else {}), **more}


def _list(items: Json, **more: Any) -> Json:
    return {"type": "array", "items": items, **more}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


_PARAMETERS: Json = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean", "null"]}}
_SHAPE: Json = _list({"type": "integer"})
_TENSOR: Json = _object({"name": _TEXT, "datatype": _TEXT, "shape": _SHAPE})
_DIMENSIONS: Json = _object({"name": _TEXT, "data_type": _TEXT, "dims": _SHAPE})
_DURATION: Json = _object({"count": _COUNT, "ns": _COUNT})
_PHASES = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")

_INFER_PARAMETERS: Json = {
    "type": ["object", "null"],
    "properties": {
        "mexit_budget": {"type": ["string", "null"], "maxLength": 64},
        "mexit_deadline_us": {"type": ["number", "null"], "exclusiveMinimum": 0},
        "timeout": {"type": ["number", "null"], "minimum": 0},
        "mexit_max_exit": {"type": ["integer", "null"], "minimum": 1},
        "mexit_receipts": {"type": ["boolean", "null"]},
        "binary_data_output": {"type": ["boolean", "null"]},
    },
    "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
}

_REQUESTED_OUTPUT: Json = _object(
    {"name": {"type": "string", "enum": list(OUTPUTS)}, "parameters": _or_null(_PARAMETERS)}, ("parameters",)
)

_INPUT: Json = _object(
    {
        "name": _TEXT,
        "datatype": {"type": "string", "const": INPUT_DATATYPE},
        "shape": _list({"type": "integer", "minimum": 1}, minItems=4, maxItems=4),
        "data": {"type": ["array", "null"], "description": "Numbers in [0, 1], flat or nested as the shape says."},
        "parameters": {
            "description": "binary_data_size: bytes after the JSON, in place of data.",
            **_or_null(_PARAMETERS),
        },
    },
    ("data", "parameters"),
)

_OUTPUT: Json = _object(
    {**_TENSOR["properties"], "data": {"type": "array"}, "parameters": _PARAMETERS}, ("data", "parameters")
)

_RECEIPT: Json = _object(
    {
        "exit": _COUNT,
        "reason": {"type": "string", "enum": list(_REASONS)},
        "macs": _COUNT,
        "saved_macs": {"type": "integer"},
        "segment_us": _list(_NUMBER),
        "rows": _COUNT,
        "queue_us": _NUMBER,
        "budget": _TEXT,
        "certificates": _list(_TEXT),
        "model": _TEXT,
    }
)

_SHARE: Json = {"type": "number", "minimum": 0, "maximum": 1}
_EXIT_ANSWER: Json = _object(
    {
        "exit": _COUNT,
        "macs": _COUNT,
        "us": {"description": "Microseconds of leaving here, by the latency profile.", **_or_null(_NUMBER)},
        "score": {"description": "Confidence score, in units of the measure.", **_or_null(_NUMBER)},
        "threshold": {"description": "Score at which an image leaves here.", **_or_null(_NUMBER)},
        "everything": {"description": "Every image that comes here leaves here.", **_TRUTH},
        "classes": {
            "description": "The most probable classes.",
            **_list(_object({"index": _COUNT, "label": _TEXT, "probability": _SHARE})),
        },
    }
)

_MODEL_STATS: Json = _object(
    {
        "name": _TEXT,
        "version": _TEXT,
        "id": _TEXT,
        "engine": _TEXT,
        "precision": _TEXT,
        "threads": _COUNT,
        "input": _SHAPE,
        "classes": _COUNT,
        "budget": _TEXT,
        "budgets": _object(
            {
                "unit": {"type": "string", "enum": ["macs", "us"]},
                "calibrated": _TRUTH,
                "lowest": _NUMBER,
                "named": {"type": "object", "additionalProperties": _NUMBER},
            }
        ),
        "exits": _list(_object({"exit": _COUNT, "macs": _COUNT, "us": _or_null(_NUMBER), "answers": _COUNT})),
        "answers_by_budget": {"type": "object", "additionalProperties": _COUNT},
        "static_macs": _COUNT,
        "static_us": _or_null(_NUMBER),
        "totals": _object(
            {
                **dict.fromkeys(("macs", "static_macs", "saved_macs", "unsure"), _COUNT),
                **dict.fromkeys(("profile_s", "static_profile_s"), _NUMBER),
            }
        ),
        "latency": {
            "description": "Durations of requests: upper edges of the buckets but the last, and cumulative counts.",
            **_object({"le_s": _list(_NUMBER), "counts": _list(_COUNT)}),
        },
        "in_flight": _COUNT,
        "drift": _or_null(_object(dict.fromkeys(("alarms", "compared", "disagreed", "macs"), _COUNT))),
    }
)

_LIMIT: Json = _or_null(_object({"macs_per_s": _COUNT, "burst_macs": _COUNT}))
_RATE_LIMITER: Json = _object(
    {
        "all": _LIMIT,
        "client": _LIMIT,
        "tokens": _or_null({"type": "integer"}),
        **dict.fromkeys(("clients", "waiting", "waits", "overloaded", "refused_rows"), _COUNT),
    }
)

_INDEX: Json = _list(
    _object(
        {"name": _TEXT, "version": _TEXT, "state": {"type": "string", "enum": list(_MODEL_STATES)}, "reason": _TEXT}
    )
)

_CAMERA_ANSWER: Json = _object(
    {
        "camera": _TEXT,
        "label": _or_null(_TEXT),
        "steady": {"description": "The label after votes.", **_or_null(_TEXT)},
        "confidence": _NUMBER,
        "exit": _COUNT,
        "reason": {"type": "string", "enum": [*_REASONS, REUSED]},
        "frame_index": _COUNT,
        "age_ms": _NUMBER,
    }
)

_CAMERA: Json = _object(
    {
        "name": _TEXT,
        "source": {"description": "Without user and password.", **_TEXT},
        "state": {"type": "string", "enum": list(STATES)},
        "error": {"description": "Why it has ended.", **_or_null(_TEXT)},
        "age_s": {"description": "Since the arrival of the last answered frame.", **_or_null(_NUMBER)},
        "answer": _or_null(_CAMERA_ANSWER),
        "counters": {"description": "Counts of frames.", "type": "object", "additionalProperties": _COUNT},
        "exits": {"description": "Answers by exit.", "type": "object", "additionalProperties": _COUNT},
        "macs": _COUNT,
        "saved_macs": {"type": "integer"},
    }
)

SCHEMAS: Json = {
    "Error": _object({"error": _TEXT}, additionalProperties=False),
    "Empty": _object({}, additionalProperties=False),
    "Object": _object({}),
    "ServerMetadata": _object({"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)}),
    "Live": _object({"live": _TRUTH}, additionalProperties=False),
    "Ready": _object({"ready": _TRUTH}, additionalProperties=False),
    "ModelReady": _object({"name": _TEXT, "ready": _TRUTH}, additionalProperties=False),
    "ModelMetadata": _object(
        {
            "name": _TEXT,
            "versions": _list(_TEXT),
            "platform": _TEXT,
            "inputs": _list(_TENSOR),
            "outputs": _list(_TENSOR),
            "parameters": _PARAMETERS,
        }
    ),
    "ModelConfig": _object(
        {
            "name": _TEXT,
            "platform": _TEXT,
            "backend": _TEXT,
            "max_batch_size": _COUNT,
            "input": _list(_DIMENSIONS),
            "output": _list(_DIMENSIONS),
        }
    ),
    "Statistics": _object(
        {
            "model_stats": _list(
                _object(
                    {
                        "name": _TEXT,
                        "version": _TEXT,
                        "last_inference": {"description": "Milliseconds since 1970.", **_COUNT},
                        "inference_count": _COUNT,
                        "execution_count": _COUNT,
                        "inference_stats": _object(dict.fromkeys(_PHASES, _DURATION)),
                        "batch_stats": _list({"type": "object"}),
                    }
                )
            )
        }
    ),
    "InferRequest": _object(
        {
            "id": {"type": ["string", "null"]},
            "inputs": _list(_INPUT, minItems=1, maxItems=1),
            "outputs": {"type": ["array", "null"], "items": _REQUESTED_OUTPUT},
            "parameters": _INFER_PARAMETERS,
        },
        ("id", "outputs", "parameters"),
    ),
    "InferResponse": _object(
        {
            "model_name": _TEXT,
            "model_version": _TEXT,
            "id": _TEXT,
            "parameters": _PARAMETERS,
            "outputs": _list(_OUTPUT),
        },
        ("id",),
    ),
    "Index": _INDEX,
    "IndexRequest": _object({"ready": {"type": ["boolean", "null"]}}, ("ready",)),
    "ChangeRequest": _object(
        {
            "parameters": {
                "type": ["object", "null"],
                "properties": {"unload_dependents": _TRUTH},
                "additionalProperties": False,
            }
        },
        ("parameters",),
    ),
    "ImageRequest": _object(
        {"image": {"type": "string", "description": "The image file as base64 or as a data URL."}},
        additionalProperties=False,
    ),
    "Prediction": _object(
        {
            "index": {"type": ["integer", "null"]},
            "label": {"type": ["string", "null"]},
            "confidence": _NUMBER,
            "probabilities": _list(_NUMBER),
            "exit": _COUNT,
            "reason": {"type": "string", "enum": list(_REASONS)},
            "macs": _COUNT,
            "saved_macs": {"type": "integer"},
            "latency_ms": _NUMBER,
            "budget": _TEXT,
            "receipt": _or_null(_RECEIPT),
        }
    ),
    "Explanation": _object(
        {
            "budget": _TEXT,
            "measure": _TEXT,
            "exit": {"description": "The exit at which the image leaves.", **_COUNT},
            "reason": {"type": "string", "enum": ["confident", "last", UNSURE]},
            "index": {"type": ["integer", "null"]},
            "label": {"type": ["string", "null"]},
            "macs": _COUNT,
            "static": {"description": "The budget runs the static network alone.", **_TRUTH},
            "static_macs": _COUNT,
            "exits": _list(_EXIT_ANSWER),
        }
    ),
    "Cameras": _list(_CAMERA),
    "ServerStats": _object(
        {
            "name": _TEXT,
            "version": _TEXT,
            "state": {"type": "string", "enum": ["ready", "stopping"]},
            "batching": _TEXT,
            "started_s": {"description": "Seconds since 1970.", **_or_null(_NUMBER)},
            "memory_bytes": _COUNT,
            "cpu_s": _NUMBER,
            "models": _list(_MODEL_STATS),
            "repository": _INDEX,
            "rate_limiter": _or_null(_RATE_LIMITER),
            "cameras": _COUNT,
            "errors": {
                "description": "Responses with an error status, by status.",
                "type": "object",
                "additionalProperties": _COUNT,
            },
        }
    ),
}
