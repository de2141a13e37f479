"""The OpenAPI description of the server's routes: `GET /openapi.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mexit.core import versions
from mexit.serving.camera_views import JPEG, MJPEG
from mexit.serving.dashboard_files import TYPES as FILES
from mexit.serving.metrics import CONTENT_TYPE as METRICS_TYPE
from mexit.serving.oip import HEADER_LENGTH, INPUT_DATATYPE, OUTPUTS
from mexit.serving.openapi_schemas import SCHEMAS

Json = dict[str, Any]
_JSON, _BYTES = "application/json", "application/octet-stream"
_ERRORS = {
    400: "The request is invalid.",
    401: "The token is missing or wrong.",
    403: "The token may not load and unload models.",
    404: "There is no such model or version in service.",
    405: "The route has another method.",
    408: "The body did not arrive in time.",
    409: "The model has no thresholds for this engine.",
    413: "The body, the image or the JSON is too large.",
    415: "The body has an unknown Content-Encoding.",
    500: "The engine failed, a version was refused, or a bug.",
    501: "An optional package is missing on the server.",
    503: "No room or no tokens now, or the server is stopping; or the version was refused.",
    504: "The deadline passed in the queue.",
}
_PLAIN = (400, 503)  # also sent as plain text, from below the application: no HTTP, too many connections
_BODY_ERRORS = (400, 408, 413, 415)
_MODEL: Json = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
_VERSION: Json = {**_MODEL, "name": "version", "schema": {"type": "string", "pattern": "^[1-9][0-9]*$"}}
_FILE: Json = {**_MODEL, "name": "file"}
_CAMERA: Json = {**_MODEL, "name": "name"}
_ENCODING: Json = {
    "name": "Content-Encoding",
    "in": "header",
    "description": "Codings of the body, separated by commas.",
    "schema": {"type": "string", "enum": ["identity", "gzip", "deflate"]},
}
_HEADER_LENGTH: Json = {
    "name": HEADER_LENGTH,
    "in": "header",
    "description": "Bytes of the JSON at the start of the body; binary tensors follow. 0: the body is one input row.",
    "schema": {"type": "integer", "minimum": 0},
}


def description() -> Json:
    """The description of all routes, OpenAPI 3.1. It names no model, and needs no token."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mexit",
            "version": versions.VERSION,
            "description": "Inference with early exits: Open Inference Protocol v2, images, metrics.",
        },
        "paths": {**_server_paths(), **_model_paths(), **_repository_paths(), **_camera_paths(), **_other_paths()},
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}, {}],
    }


def _server_paths() -> Json:
    return {
        "/v2": {"get": _operation("Name, version and extensions of the server", "ServerMetadata")},
        "/v2/health/live": {"get": _public("Whether the process answers", "Live")},
        "/v2/health/ready": {"get": _public("Whether the server accepts requests", "Ready", unready=True)},
        "/v2/models/stats": {"get": _operation("Statistics of all models", "Statistics")},
    }


def _model_paths() -> Json:
    """The routes of a model, without and with its version."""
    paths: Json = {}
    for path, parameters in (
        ("/v2/models/{model}", [_MODEL]),
        ("/v2/models/{model}/versions/{version}", [_MODEL, _VERSION]),
    ):
        errors = (404, 503)
        ready = _operation("Whether the model is ready", "ModelReady", errors)
        ready["responses"]["503"] = _either("ModelReady", "Error", "The model is not ready.")
        for suffix, method, operation in (
            ("", "get", _operation("Inputs, outputs, classes and costs", "ModelMetadata", errors)),
            ("/ready", "get", ready),
            ("/config", "get", _operation("The configuration in Triton's terms", "ModelConfig", errors)),
            ("/stats", "get", _operation("Counts and durations", "Statistics", errors)),
            ("/infer", "post", _infer()),
        ):
            paths[path + suffix] = {method: operation, "parameters": parameters}
    return paths


def _infer() -> Json:
    errors = (*_BODY_ERRORS, 404, 409, 500, 503, 504)
    operation = _operation("Predictions for tensors", "InferResponse", errors)
    operation["description"] = (
        f"One input, {INPUT_DATATYPE} in [0, 1] of shape [rows, channels, height, width]. "
        f"Outputs: {', '.join(OUTPUTS)}. Deadline and budget are parameters."
    )
    operation["parameters"] = [_HEADER_LENGTH, _ENCODING]
    operation["requestBody"] = _body({_JSON: _ref("InferRequest"), _BYTES: {"type": "string", "format": "binary"}})
    operation["responses"]["200"]["content"][_BYTES] = {"schema": {"type": "string", "format": "binary"}}
    operation["responses"]["200"]["headers"] = {
        HEADER_LENGTH: {"schema": {"type": "integer"}, "description": "Bytes of the JSON before binary outputs."}
    }
    return operation


def _repository_paths() -> Json:
    index = _operation("Models, versions, states and reasons", "Index", _BODY_ERRORS)
    index["requestBody"] = _body({_JSON: _ref("IndexRequest")}, required=False)
    paths: Json = {"/v2/repository/index": {"post": index}}
    for action, summary in (
        ("load", "Put the newest version into service"),
        ("unload", "Take a model out of service"),
    ):
        operation = _operation(summary, "Empty", (*_BODY_ERRORS, 403, 404, 500, 503))
        operation["requestBody"] = _body({_JSON: _ref("ChangeRequest")}, required=False)
        paths[f"/v2/repository/models/{{model}}/{action}"] = {"post": operation, "parameters": [_MODEL]}
    return paths


def _other_paths() -> Json:
    classify = _operation(
        "The prediction for one encoded image", "Prediction", (*_BODY_ERRORS, 404, 409, 500, 501, 503, 504)
    )
    classify["parameters"] = [*map(_query, _QUERY), _ENCODING]
    classify["requestBody"] = _body({"image/*": {"type": "string", "format": "binary"}, _JSON: _ref("ImageRequest")})
    metrics = _operation("Prometheus text", "Error")
    metrics["responses"]["200"]["content"] = {METRICS_TYPE.partition(";")[0]: {"schema": {"type": "string"}}}
    part = _page("A file of the dashboard", [kind.partition(";")[0] for kind in FILES.values()])
    part["responses"]["404"] = _error(404)
    explain = _operation(
        "What every exit answers for one encoded image, and where the budget lets it leave",
        "Explanation",
        (*_BODY_ERRORS, 404, 409, 500, 501, 503, 504),
    )
    explain["parameters"] = [*map(_query, _QUERY[:2]), _ENCODING]
    explain["requestBody"] = classify["requestBody"]
    return {
        "/v1/classify": {"post": classify},
        "/v1/explain": {"post": explain},
        "/v1/stats": {"get": _operation("State and counts of the server and its models", "ServerStats")},
        "/metrics": {"get": metrics},
        "/openapi.json": {"get": _public("This description", "Object")},
        "/docs": {"get": _page("This description as a page", ("text/html",))},
        "/": {"get": _page("The dashboard", ("text/html",))},
        "/dashboard/{file}": {"get": part, "parameters": [_FILE]},
    }


def _camera_paths() -> Json:
    """The routes of cameras; a server without cameras answers 404."""
    paths: Json = {"/v1/cameras": {"get": _operation("State of each camera", "Cameras", (404,))}}
    for file, kind, summary in (
        ("picture.jpg", JPEG, "The last answered frame, at most 320 pixels wide and 1280 high"),
        ("stream.mjpg", MJPEG, "Answered frames from now on, MJPEG"),
    ):
        operation = _operation(summary, "Error", (404, 501, 503))
        operation["responses"]["200"]["content"] = {
            kind.partition(";")[0]: {"schema": {"type": "string", "format": "binary"}}
        }
        paths[f"/v1/cameras/{{name}}/{file}"] = {"get": operation, "parameters": [_CAMERA]}
    return paths


def _page(summary: str, kinds: Sequence[str]) -> Json:
    """A file for browsers, of one of several types."""
    operation = _public(summary, "Error")
    operation["responses"]["200"]["content"] = {kind: {"schema": {"type": "string"}} for kind in kinds}
    return operation


_QUERY: Sequence[tuple[str, str, Json]] = (
    ("model", "Name of the model; required if the server has several.", {"type": "string"}),
    ("budget", "low, medium, high, full, MACs (800k) or a share of the full cost (40%).", {"type": "string"}),
    ("deadline_ms", "Milliseconds from the arrival of the request.", {"type": "number", "exclusiveMinimum": 0}),
    ("max_exit", "The last exit that may answer.", {"type": "integer", "minimum": 1}),
    ("receipts", "Whether to return the cost in detail.", {"type": "boolean"}),
)


def _query(entry: tuple[str, str, Json]) -> Json:
    name, text, schema = entry
    return {"name": name, "in": "query", "description": text, "schema": schema}


def _operation(summary: str, answer: str, errors: Sequence[int] = ()) -> Json:
    """An operation whose answer has a schema, and that needs a token where the server has tokens."""
    responses = {"200": _content("The answer.", {_JSON: _ref(answer)})}
    for status in sorted({401, 405, *errors}):
        responses[str(status)] = _error(status)
    return {"summary": summary, "responses": responses}


def _public(summary: str, answer: str, *, unready: bool = False) -> Json:
    """An operation without a token; `unready`: 503 has the same answer."""
    operation = {**_operation(summary, answer), "security": []}
    del operation["responses"]["401"]
    if unready:
        operation["responses"]["503"] = _either(answer, "Error", "The server is not ready.")
    return operation


def _error(status: int) -> Json:
    content = {_JSON: _ref("Error")}
    if status in _PLAIN:
        content["text/plain"] = {"type": "string"}
    return _content(_ERRORS[status], content)


def _either(first: str, second: str, text: str) -> Json:
    return _content(text, {_JSON: {"oneOf": [_ref(first), _ref(second)]}, "text/plain": {"type": "string"}})


def _content(text: str, schemas: Mapping[str, Json]) -> Json:
    return {"description": text, **_body(schemas, required=None)}


def _body(schemas: Mapping[str, Json], *, required: bool | None = True) -> Json:
    content: Json = {"content": {kind: {"schema": schema} for kind, schema in schemas.items()}}
    return content if required is None else {"required": required, **content}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}
