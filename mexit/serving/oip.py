"""Inference requests and responses of the Open Inference Protocol v2, with the binary tensor extension.

    JSON       the whole body is one object; `data` is a list of numbers, flat or nested
    binary     a JSON object of the length in `Inference-Header-Content-Length`, then raw tensors
    raw        that header is 0: the whole body is the input tensor, one row; all outputs are returned binary

A request holds the model's one input. The response holds the requested outputs in their order, by default all;
binary outputs follow the JSON of the response in that order. Raw tensors are little-endian and row-major.

Specification: https://github.com/kserve/open-inference-protocol
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.manifest import InputSpec
from mexit.data.preprocess import check_tensor
from mexit.errors import BadInput
from mexit.runtime.prediction import UNSURE, Prediction
from mexit.runtime.request import RequestOptions
from mexit.serving.limits import Limits
from mexit.serving.request_body import parse_json, short_repr
from mexit.serving.request_options import options_from_parameters

HEADER_LENGTH = "Inference-Header-Content-Length"
UNSURE_LABEL = -1  # of an unsure answer; tensors have no null
INPUT_DATATYPE = "FP32"
_FLOAT_BYTES = 4
_UNSUPPORTED_PARAMETERS = ("shared_memory_region", "classification")  # of extensions that are not implemented


@dataclass(frozen=True)
class Output:
    """One output of the model.

    Attributes:
        datatype: the protocol's name of the type.
        dtype: numpy's name of the type, little-endian.
        value: returns the output's value for one prediction.
        per_class: whether the value is a vector of C numbers, not one number.
    """

    datatype: str
    dtype: str
    value: Callable[[Prediction], Any]
    per_class: bool = False


OUTPUTS = {
    "probabilities": Output("FP32", "<f4", lambda prediction: prediction.probabilities, per_class=True),
    "label": Output("INT64", "<i8", lambda prediction: UNSURE_LABEL if prediction.index is None else prediction.index),
    "confidence": Output("FP32", "<f4", lambda prediction: prediction.confidence),
    "exit": Output("INT32", "<i4", lambda prediction: prediction.exit),
    "macs": Output("INT64", "<i8", lambda prediction: prediction.macs),
}


@dataclass(frozen=True)
class InferRequest:
    """One parsed inference request.

    Attributes:
        tensor: images, (B, C, H, W) float32 in [0, 1].
        outputs: name of each requested output, and whether it is returned binary.
        options: budget, deadline, last exit and receipts.
        id: the client's id of the request, returned in the response.
    """

    tensor: NDArray[np.float32]
    outputs: Mapping[str, bool]
    options: RequestOptions
    id: str | None = None


def parse_header_length(values: Sequence[str], body_bytes: int) -> int | None:
    """The length of the JSON part in bytes, from the values of `HEADER_LENGTH`; None if the whole body is JSON.

    Raises:
        BadInput: not one whole number up to `body_bytes`.
    """
    if not values:
        return None
    text = values[0]
    is_number = len(values) == 1 and text.isascii() and text.isdigit() and len(text) < 20
    if not is_number or int(text) > body_bytes:
        raise BadInput(f"{HEADER_LENGTH} must lie within the {body_bytes} bytes of the body, found {short_repr(text)}")
    return int(text)


def parse_request(body: bytes, header_length: int | None, spec: InputSpec, limits: Limits) -> InferRequest:
    """Parse the body of an inference request.

    Args:
        body: the decompressed body.
        header_length: length of the JSON part, bytes; None if the whole body is JSON.
        spec: the model's input.
        limits: `rows`, `json_values` and `json_depth` apply.

    Raises:
        BadInput: the message names what was expected and what was found.
        TooLarge: the JSON holds too many values.
    """
    if header_length == 0:
        tensor = _tensor_from_bytes(body, (1, *spec.shape), spec.name)
        return InferRequest(check_tensor(tensor, spec), dict.fromkeys(OUTPUTS, True), {})
    json_bytes = len(body) if header_length is None else header_length
    return read_request(_object(parse_json(body[:json_bytes], limits), "the request"), body[json_bytes:], spec, limits)


def read_request(request: Mapping[str, Any], raw: bytes, spec: InputSpec, limits: Limits) -> InferRequest:
    """Parse the fields of an inference request.

    Args:
        request: the fields.
        raw: bytes of the input tensor, if it has the parameter `binary_data_size`.
        spec: the model's input.
        limits: `rows` applies.

    Raises:
        BadInput: the message names what was expected and what was found.
    """
    parameters = _parameters(request, "the request")
    options = options_from_parameters(parameters)
    binary = _flag(parameters, "binary_data_output", "the request")
    outputs = _requested_outputs(request.get("outputs"), binary or False)
    tensor = check_tensor(_input_tensor(request, raw, spec, limits), spec)
    request_id = request.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise BadInput(f"id must be a string, found {short_repr(request_id)}")
    return InferRequest(tensor, outputs, options, request_id)


def write_response(
    request: InferRequest, predictions: Sequence[Prediction], model: str, version: str
) -> tuple[bytes, dict[str, str]]:
    """The body of the response and its headers; `version` is the number of the model's version."""
    entries, raw_tensors = [], []
    for name, values in output_arrays(request, predictions):
        entry: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name].datatype, "shape": list(values.shape)}
        if request.outputs[name]:
            raw_tensors.append(values.tobytes())
            entry["parameters"] = {"binary_data_size": len(raw_tensors[-1])}
        else:
            entry["data"] = values.ravel().tolist()
        entries.append(entry)
    response: dict[str, Any] = {"model_name": model, "model_version": version}
    if request.id is not None:
        response["id"] = request.id
    response |= {"parameters": response_parameters(predictions), "outputs": entries}
    content = json.dumps(response, allow_nan=False).encode()
    if not raw_tensors:
        return content, {"content-type": "application/json"}
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(content))}
    return b"".join([content, *raw_tensors]), headers


def output_arrays(
    request: InferRequest, predictions: Sequence[Prediction]
) -> Iterator[tuple[str, NDArray[np.generic]]]:
    """The requested outputs in their order: name, and values (B,) or (B, C)."""
    for name in request.outputs:
        output = OUTPUTS[name]
        yield name, np.array([output.value(prediction) for prediction in predictions], output.dtype)


def response_parameters(predictions: Sequence[Prediction]) -> dict[str, str | int | float]:
    """Costs of the predictions. Parameters must be flat, so receipts are a JSON text."""
    macs = [prediction.macs for prediction in predictions]
    saved = [prediction.saved_macs for prediction in predictions]
    receipts = [prediction.receipt_json() for prediction in predictions if prediction.receipt is not None]
    return {
        "mexit_budget": predictions[0].budget,
        "mexit_mean_macs": sum(macs) / len(macs),
        "mexit_saved": sum(saved) / (sum(macs) + sum(saved)),
        "mexit_late_rows": sum(prediction.reason == "deadline" for prediction in predictions),
        "mexit_rate_limited_rows": sum(prediction.reason == "rate-limit" for prediction in predictions),
        "mexit_unsure_rows": sum(prediction.reason == UNSURE for prediction in predictions),
        **({"mexit_receipts": json.dumps(receipts)} if receipts else {}),
    }


def _input_tensor(request: Mapping[str, Any], raw: bytes, spec: InputSpec, limits: Limits) -> NDArray[np.float32]:
    """The tensor of the request's input: from its `data`, or from the bytes after the JSON."""
    entry = _input_entry(request.get("inputs"), spec)
    if entry.get("datatype") != INPUT_DATATYPE:
        datatype = short_repr(entry.get("datatype"))
        raise BadInput(f"input '{spec.name}': expected datatype {INPUT_DATATYPE}, found {datatype}")
    shape = _check_shape(entry.get("shape"), spec, limits.rows)
    size = _parameters(entry, f"input '{spec.name}'").get("binary_data_size")
    if (size is None) != ("data" in entry):
        raise BadInput(f"input '{spec.name}': send either data or the parameter binary_data_size")
    announced = 0 if size is None else size
    if type(announced) is not int or announced != len(raw):
        raise BadInput(
            f"input '{spec.name}': binary_data_size is {short_repr(size)}, the body has {len(raw)} bytes after "
            f"the JSON (its length is the header {HEADER_LENGTH})"
        )
    if size is None:
        return _tensor_from_json(entry["data"], shape, spec.name)
    return _tensor_from_bytes(raw, shape, spec.name)


def _input_entry(inputs: Any, spec: InputSpec) -> dict[str, Any]:
    """The entry of the model's input. Raises `BadInput` for unknown, repeated and missing inputs."""
    entries = [_object(entry, "an input") for entry in _list(inputs, "inputs")]
    unknown = [entry.get("name") for entry in entries if entry.get("name") != spec.name]
    if unknown:
        raise BadInput(f"unknown input {short_repr(unknown[0])}: the model has one input, '{spec.name}'")
    if len(entries) != 1:
        raise BadInput(f"the model takes its input '{spec.name}' once, found it {len(entries)} times")
    return entries[0]


def _requested_outputs(entries: Any, binary: bool) -> dict[str, bool]:
    """Names of the requested outputs, and whether each is returned binary; `binary` is the request's default."""
    if entries is None or entries == []:
        return dict.fromkeys(OUTPUTS, binary)
    outputs: dict[str, bool] = {}
    for entry in [_object(entry, "an output") for entry in _list(entries, "outputs")]:
        name = entry.get("name")
        if not isinstance(name, str) or name not in OUTPUTS:
            raise BadInput(f"unknown output {short_repr(name)}: the model has {', '.join(OUTPUTS)}")
        if name in outputs:
            raise BadInput(f"output '{name}' is asked for twice")
        own_flag = _flag(_parameters(entry, f"output '{name}'"), "binary_data", f"output '{name}'")
        outputs[name] = binary if own_flag is None else own_flag
    return outputs


def _check_shape(shape: Any, spec: InputSpec, max_rows: int) -> tuple[int, int, int, int]:
    """The shape (B, C, H, W) of a request's input. Raises `BadInput`.

    JSON integers have any size, so they are compared with the model's shape before any product is computed.
    """
    expected = [-1, *spec.shape]
    is_shape = isinstance(shape, list) and all(type(size) is int for size in shape)
    if not is_shape or len(shape) != len(expected) or tuple(shape[1:]) != spec.shape or shape[0] < 1:
        received = shape[:6] if is_shape else short_repr(shape)
        raise BadInput(f"input '{spec.name}': expected shape {expected} with at least 1 row, found {received}")
    if shape[0] > max_rows:
        raise BadInput(f"input '{spec.name}': at most {max_rows} rows in one request, found {short_repr(shape[0])}")
    return (shape[0], *spec.shape)


def _tensor_from_bytes(content: bytes, shape: tuple[int, ...], name: str) -> NDArray[np.float32]:
    expected = int(np.prod(shape)) * _FLOAT_BYTES
    if len(content) != expected:
        raise BadInput(
            f"input '{name}': shape {list(shape)} {INPUT_DATATYPE} takes {expected} bytes, found {len(content)}"
        )
    return np.frombuffer(content, "<f4").astype(np.float32, copy=False).reshape(shape)


def _tensor_from_json(data: Any, shape: tuple[int, ...], name: str) -> NDArray[np.float32]:
    numbers, data_shape = _flatten(data, name, len(shape))
    if data_shape not in ([int(np.prod(shape))], list(shape)):
        raise BadInput(f"input '{name}': shape {list(shape)} does not fit data of shape {data_shape}")
    other_types = set(map(type, numbers)) - {int, float}  # numpy would convert true to 1 and "2" to 2
    if other_types:
        raise BadInput(f"input '{name}': data must be numbers, found {other_types.pop().__name__}")
    try:
        with np.errstate(over="ignore"):  # `check_tensor` refuses infinity, like every value outside [0, 1]
            return np.array(numbers, np.float32).reshape(shape)
    except OverflowError:
        raise BadInput(f"input '{name}': data must be numbers in [0, 1], found one that no float holds") from None


def _flatten(data: Any, name: str, max_depth: int) -> tuple[list[Any], list[int]]:
    """A nested list as a flat list, and the shape of the nested one."""
    if not isinstance(data, list):
        raise BadInput(f"input '{name}': data must be a list, found {short_repr(data)}")
    shape = [len(data)]
    while data and isinstance(data[0], list):
        width = len(data[0])
        is_regular = all(isinstance(row, list) and len(row) == width for row in data)
        if not is_regular or len(shape) == max_depth:
            raise BadInput(f"input '{name}': data must be flat, or nested as its shape says")
        shape.append(width)
        data = list(chain.from_iterable(data))
    return data, shape


def _parameters(owner: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The parameters of a request or tensor: strings, numbers and booleans."""
    parameters = _object(owner.get("parameters", {}), f"parameters of {where}")
    for name, value in parameters.items():
        if not isinstance(value, str | int | float | bool):
            raise BadInput(f"{where}: parameter {short_repr(name)} must be a string, number or boolean")
        if name in _UNSUPPORTED_PARAMETERS:
            raise BadInput(f"{where}: the parameter {name} is of an extension that this server does not offer")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, where: str) -> bool | None:
    value = parameters.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadInput(f"{where}: parameter {name} must be true or false, found {short_repr(value)}")
    return value


def _object(value: Any, what: str) -> dict[str, Any]:
    """A JSON object without its null entries: clients in typed languages write an absent field as null."""
    if not isinstance(value, dict):
        raise BadInput(f"{what} must be a JSON object, found {short_repr(value)}")
    return {name: entry for name, entry in value.items() if entry is not None}


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadInput(f"{what} must be a JSON list, found {short_repr(value)}")
    return value
