"""Inference requests and responses of the Open Inference Protocol v2, with the binary tensor extension.

    JSON       the whole body is one object; `data` is a list of numbers, flat or nested
    binary     a JSON object as long as the header `Inference-Header-Content-Length` says, then raw tensors
    raw        that header is 0: the whole body is the only input, one row; all outputs come back binary

A request holds the one input of the model. Outputs come back in the order asked for, all of them unless the
request names some; binary ones follow the JSON of the response in that order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.manifest import InputSpec
from mexit.data.preprocess import check_tensor
from mexit.errors import BadInput
from mexit.runtime.prediction import Prediction
from mexit.serving import oip_tensors, request_options, strict_json
from mexit.serving.limits import Limits
from mexit.serving.request_options import Options
from mexit.serving.strict_json import shown

HEADER_LENGTH = "Inference-Header-Content-Length"
VERSION = "1"  # a bundle never changes, so a model has one version
_ELSEWHERE = ("shared_memory_region", "classification")  # parameters of extensions that are not offered


@dataclass(frozen=True)
class InferRequest:
    """One parsed request.

    Attributes:
        tensor: (B, C, H, W) float32.
        outputs: names, and whether each comes back binary.
        options: budget, deadline and last exit.
        id: to be sent back.
    """

    tensor: NDArray[np.float32]
    outputs: Mapping[str, bool]
    options: Options
    id: str | None = None


def parse_header_length(values: Sequence[str], body_bytes: int) -> int | None:
    """The length of the JSON part; None where the whole body is JSON."""
    if not values:
        return None
    text = values[0]
    good = len(values) == 1 and text.isascii() and text.isdigit() and len(text) < 20
    if not good or int(text) > body_bytes:
        raise BadInput(f"{HEADER_LENGTH} must lie within the {body_bytes} bytes of the body, found {shown(text)}")
    return int(text)


def parse_request(body: bytes, header_length: int | None, spec: InputSpec, limits: Limits) -> InferRequest:
    """Read the body of a request. Raises `BadInput` naming what was expected and found, `TooLarge`."""
    if header_length == 0:
        tensor = oip_tensors.from_bytes(body, (1, *spec.shape), spec.name)
        return InferRequest(check_tensor(tensor, spec), dict.fromkeys(oip_tensors.OUTPUTS, True), Options())
    split = len(body) if header_length is None else header_length
    request = _object(strict_json.parse(body[:split], limits), "the request")
    parameters = _parameters(request, "the request")
    wanted = request_options.from_parameters(parameters)
    binary = _flag(parameters, "binary_data_output", "the request")
    outputs = _outputs(request.get("outputs"), binary or False)
    tensor = check_tensor(_input(request, body[split:], spec, limits), spec)
    return InferRequest(tensor, outputs, wanted, _text(request, "id"))


def write_response(
    request: InferRequest, predictions: Sequence[Prediction], model: str
) -> tuple[bytes, dict[str, str]]:
    """The body of the response and its headers."""
    described, raw = [], []
    for name, binary in request.outputs.items():
        values = oip_tensors.output_array(name, predictions)
        entry = {"name": name, "datatype": oip_tensors.OUTPUTS[name].datatype, "shape": list(values.shape)}
        if binary:
            raw.append(values.tobytes())
            described.append({**entry, "parameters": {"binary_data_size": len(raw[-1])}})
        else:
            described.append({**entry, "data": values.ravel().tolist()})
    head = {"model_name": model, "model_version": VERSION, **({} if request.id is None else {"id": request.id})}
    response = {**head, "parameters": _costs(predictions), "outputs": described}
    content = json.dumps(response, allow_nan=False).encode()
    if not raw:
        return content, {"content-type": "application/json"}
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(content))}
    return b"".join([content, *raw]), headers


def _costs(predictions: Sequence[Prediction]) -> dict[str, str | int | float]:
    """What the answers cost. Flat, as parameters must be; receipts are a JSON text."""
    macs = [prediction.macs for prediction in predictions]
    saved = [prediction.saved_macs for prediction in predictions]
    receipts = [prediction.receipt_json() for prediction in predictions if prediction.receipt is not None]
    return {
        "mexit_budget": predictions[0].budget,
        "mexit_mean_macs": sum(macs) / len(macs),
        "mexit_saved": sum(saved) / (sum(macs) + sum(saved)),
        "mexit_late_rows": sum(prediction.reason == "deadline" for prediction in predictions),
        "mexit_rate_limited_rows": sum(prediction.reason == "rate-limit" for prediction in predictions),
        **({"mexit_receipts": json.dumps(receipts)} if receipts else {}),
    }


def _input(request: Mapping[str, Any], raw: bytes, spec: InputSpec, limits: Limits) -> NDArray[np.float32]:
    entry = _only_input(request.get("inputs"), spec)
    if entry.get("datatype") != oip_tensors.INPUT_DATATYPE:
        found = shown(entry.get("datatype"))
        raise BadInput(f"input '{spec.name}': expected datatype {oip_tensors.INPUT_DATATYPE}, found {found}")
    shape = oip_tensors.check_shape(entry.get("shape"), spec, limits.rows)
    size = _parameters(entry, f"input '{spec.name}'").get("binary_data_size")
    if (size is None) != ("data" in entry):
        raise BadInput(f"input '{spec.name}': send either data or the parameter binary_data_size")
    announced = 0 if size is None else size
    if type(announced) is not int or announced != len(raw):
        raise BadInput(
            f"input '{spec.name}': binary_data_size is {shown(size)}, the body has {len(raw)} bytes after the "
            f"JSON (its length is the header {HEADER_LENGTH})"
        )
    if size is None:
        return oip_tensors.from_json(entry["data"], shape, spec.name)
    return oip_tensors.from_bytes(raw, shape, spec.name)


def _only_input(inputs: Any, spec: InputSpec) -> dict[str, Any]:
    """The entry of the one input. Refuses unknown, repeated and missing ones."""
    entries = [_object(entry, "an input") for entry in _list(inputs, "inputs")]
    names = [entry.get("name") for entry in entries]
    unknown = [name for name in names if name != spec.name]
    if unknown:
        raise BadInput(f"unknown input {shown(unknown[0])}: the model has one input, '{spec.name}'")
    if len(entries) != 1:
        raise BadInput(f"the model takes its input '{spec.name}' once, found it {len(entries)} times")
    return entries[0]


def _outputs(wanted: Any, binary: bool) -> dict[str, bool]:
    if wanted is None or wanted == []:
        return dict.fromkeys(oip_tensors.OUTPUTS, binary)
    outputs: dict[str, bool] = {}
    for entry in [_object(entry, "an output") for entry in _list(wanted, "outputs")]:
        name = entry.get("name")
        if not isinstance(name, str) or name not in oip_tensors.OUTPUTS:
            raise BadInput(f"unknown output {shown(name)}: the model has {', '.join(oip_tensors.OUTPUTS)}")
        if name in outputs:
            raise BadInput(f"output '{name}' is asked for twice")
        own = _flag(_parameters(entry, f"output '{name}'"), "binary_data", f"output '{name}'")
        outputs[name] = binary if own is None else own
    return outputs


def _parameters(holder: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The parameters of a request or tensor: strings, numbers and truth values."""
    parameters = _object(holder.get("parameters", {}), f"parameters of {where}")
    for name, value in parameters.items():
        if not isinstance(value, str | int | float | bool):
            raise BadInput(f"{where}: parameter {shown(name)} must be a string, number or boolean")
        if name in _ELSEWHERE:
            raise BadInput(f"{where}: the parameter {name} is of an extension that this server does not offer")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, where: str) -> bool | None:
    value = parameters.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadInput(f"{where}: parameter {name} must be true or false, found {shown(value)}")
    return value


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadInput(f"{what} must be a JSON object, found {shown(value)}")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadInput(f"{what} must be a JSON list, found {shown(value)}")
    return value


def _text(holder: Mapping[str, Any], name: str) -> str | None:
    value = holder.get(name)
    if value is not None and not isinstance(value, str):
        raise BadInput(f"{name} must be a string, found {shown(value)}")
    return value
