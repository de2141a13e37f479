"""Inference requests and responses of the Open Inference Protocol as protobuf messages.

Tensors are in `raw_input_contents` (bytes), or in `contents.fp32_contents` (numbers) of the input. The response uses
the same form. All checks but those of the messages themselves are those of `oip`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mexit.core.manifest import InputSpec
from mexit.errors import BadInput, TooLarge
from mexit.runtime.prediction import Prediction
from mexit.serving import grpc_messages, oip
from mexit.serving.limits import Limits

# Number of a field that holds tensors, to those inside it.
_Tensors = Mapping[int, "_Tensors"]
_TENSORS: _Tensors = {7: {}, 5: {5: {6: {}}}}  # raw_input_contents; inputs, contents, fp32_contents
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BITS = 63
_CONTENTS = {"FP32": "fp32_contents", "INT64": "int64_contents", "INT32": "int_contents"}


def parse_message(content: bytes, limits: Limits) -> Any:
    """The message of an inference request.

    Args:
        content: bytes of the message.
        limits: `head_bytes` bounds what is no tensor: a field of two bytes becomes an object of a hundred.

    Raises:
        BadInput: the bytes are no such message.
        TooLarge: too many bytes besides tensors.
    """
    if _count_other(content, 0, len(content), _TENSORS, limits.head_bytes) > limits.head_bytes:
        raise TooLarge(f"the message has more than {limits.head_bytes} bytes besides its tensors")
    return grpc_messages.parse("ModelInferRequest", content)


def read_request(
    message: Any, spec: InputSpec, limits: Limits, call_ms: float | None, default_ms: float | None
) -> oip.InferRequest:
    """Parse an inference request.

    Args:
        message: the message of the request.
        spec: the model's input.
        limits: `rows` applies.
        call_ms: deadline of the call, milliseconds from the arrival of the message; None without one.
        default_ms: deadline of requests that name none, milliseconds; None without one.

    Raises:
        BadInput: the message names what was expected and what was found.
    """
    inputs = [_entry(tensor, shape=list(tensor.shape), datatype=tensor.datatype) for tensor in message.inputs]
    raw = _tensor_bytes(message)
    if inputs:
        inputs[0]["parameters"]["binary_data_size"] = len(raw)
    fields = {
        "id": message.id or None,
        "parameters": _values(message.parameters),
        "inputs": inputs,
        "outputs": [_entry(output) for output in message.outputs],
    }
    request = oip.read_request(fields, raw, spec, limits)
    if call_ms is None:
        return request
    named_ms = request.options.get("deadline_ms")
    deadlines_ms = [call_ms, default_ms if named_ms is None else named_ms]
    earliest_ms = min(deadline_ms for deadline_ms in deadlines_ms if deadline_ms is not None)
    return replace(request, options={**request.options, "deadline_ms": earliest_ms})


def write_response(
    request: oip.InferRequest, predictions: Sequence[Prediction], model: str, version: str, *, raw: bool
) -> Any:
    """The message of the response; `raw`: its tensors are bytes, not numbers."""
    response = grpc_messages.new("ModelInferResponse", model_name=model, model_version=version, id=request.id or "")
    for name, value in oip.response_parameters(predictions).items():
        field = {str: "string_param", int: "int64_param", float: "double_param"}[type(value)]
        setattr(response.parameters[name], field, value)
    for name, values in oip.output_arrays(request, predictions):
        datatype = oip.OUTPUTS[name].datatype
        tensor = response.outputs.add(name=name, datatype=datatype, shape=values.shape)
        if raw:
            response.raw_output_contents.append(values.tobytes())
        else:
            getattr(tensor.contents, _CONTENTS[datatype]).extend(values.ravel().tolist())
    return response


def _tensor_bytes(message: Any) -> bytes:
    """The bytes of the first input's tensor."""
    raw, inputs = message.raw_input_contents, message.inputs
    typed = [tensor.name for tensor in inputs if tensor.HasField("contents")]
    if raw and typed:
        raise BadInput("send either raw_input_contents or the contents of each input, found both")
    if raw and len(raw) != len(inputs):
        raise BadInput(f"raw_input_contents holds {len(raw)} tensors, the request has {len(inputs)} inputs")
    if raw:
        return bytes(raw[0])
    numbers = inputs[0].contents.fp32_contents if inputs else ()
    return np.fromiter(numbers, "<f4", len(numbers)).tobytes()


def _entry(tensor: Any, **fields: Any) -> dict[str, Any]:
    return {"name": tensor.name, **fields, "parameters": _values(tensor.parameters)}


def _values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The values of parameters; one without a value is left out."""
    chosen = {name: parameter.WhichOneof("parameter_choice") for name, parameter in parameters.items()}
    return {name: getattr(parameters[name], field) for name, field in chosen.items() if field is not None}


def _count_other(content: bytes, start: int, end: int, tensors: _Tensors, limit: int) -> int:
    """The bytes from `start` to `end` that are no tensor data; the count ends above `limit`. Raises `BadInput`."""
    other = 0
    while start < end and other <= limit:
        field_start = start
        tag, start = _read_varint(content, start, end)
        number, kind = tag >> 3, tag & 7
        stop = _value_end(content, start, end, kind)
        if kind == _LENGTH and number in tensors:
            value_start = _read_varint(content, start, end)[1]
            other += value_start - field_start
            if tensors[number]:
                other += _count_other(content, value_start, stop, tensors[number], limit - other)
        else:
            other += stop - field_start
        start = stop
    return other


def _value_end(content: bytes, start: int, end: int, kind: int) -> int:
    """Where the value of a field ends. Raises `BadInput`."""
    if kind == _LENGTH:
        length, start = _read_varint(content, start, end)
        stop = start + length
    elif kind == _VARINT:
        stop = _read_varint(content, start, end)[1]
    elif kind in (_FIXED32, _FIXED64):
        stop = start + (4 if kind == _FIXED32 else 8)
    else:
        raise BadInput("the message is not a valid ModelInferRequest")
    if stop > end:
        raise BadInput("the message is not a valid ModelInferRequest: it ends inside a field")
    return stop


def _read_varint(content: bytes, start: int, end: int) -> tuple[int, int]:
    """An integer of variable length, and where it ends. Raises `BadInput`."""
    value = 0
    for shift, position in zip(range(0, _MAX_VARINT_BITS + 1, 7), range(start, end), strict=False):
        byte = content[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position + 1
    raise BadInput("the message is not a valid ModelInferRequest: it ends inside a number")
