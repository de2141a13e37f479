"""Inference requests as protobuf messages, without a server."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as triton

from mexit.core.manifest import InputSpec, PrepareSpec
from mexit.errors import BadInput, TooLarge
from mexit.serving import grpc_infer
from mexit.serving.limits import Limits

SPEC = InputSpec("input", "float32", "NCHW", 3, (2, 4), (0.0, 1.0), PrepareSpec())
LIMITS = Limits(rows=2, head_bytes=1000)
PIXELS = np.random.default_rng(0).random((2, 3, 2, 4), np.float32)


def request_of(rows: int = 2, *, raw: bool = True, **parameters: int) -> triton.ModelInferRequest:
    request = triton.ModelInferRequest(model_name="digits")
    tensor = request.inputs.add(name="input", datatype="FP32", shape=[rows, 3, 2, 4])
    if raw:
        request.raw_input_contents.append(PIXELS[:rows].tobytes())
    else:
        tensor.contents.fp32_contents.extend(PIXELS[:rows].ravel().tolist())
    for name, value in parameters.items():
        request.parameters[name].int64_param = value
    return request


def parse(content: bytes) -> grpc_infer.oip.InferRequest:
    return grpc_infer.read_request(grpc_infer.parse_message(content, LIMITS), SPEC, LIMITS, None, None)


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
def test_both_forms_of_a_tensor(raw: bool) -> None:
    parsed = parse(request_of(raw=raw).SerializeToString())
    np.testing.assert_array_equal(parsed.tensor, PIXELS)


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_bad_input(content: bytes) -> None:
    with pytest.raises(BadInput):
        parse(content)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_changed_bytes_are_read_or_bad_input(data: st.DataObject) -> None:
    content = bytearray(request_of(raw=data.draw(st.booleans())).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(content)))
    try:
        parsed = parse(bytes(content[:end]))
    except BadInput as error:
        refusal = error
    else:
        assert parsed.tensor.shape[1:] == (3, 2, 4)
        return
    assert len(str(refusal)) < 300


@pytest.mark.parametrize("field", ["inputs", "outputs", "parameters", "raw_input_contents", "shape", "contents"])
def test_many_small_fields_are_refused_before_they_are_parsed(field: str) -> None:
    """Two bytes of a message can become an object of a hundred bytes."""
    request = request_of(raw=field != "contents")
    if field == "parameters":
        for number in range(1000):
            request.parameters[str(number)].bool_param = True
    elif field == "shape":
        request.inputs[0].shape.extend([1] * 2000)
    elif field == "contents":
        request.inputs[0].contents.bytes_contents.extend([b""] * 1000)
    else:
        repeated = getattr(request, field)
        repeated.extend([b"" if field == "raw_input_contents" else repeated.add()] * 1000)
    with pytest.raises(TooLarge, match="more than 1000 bytes besides its tensors"):
        grpc_infer.parse_message(request.SerializeToString(), LIMITS)


def test_a_large_tensor_does_not_count() -> None:
    request = triton.ModelInferRequest(model_name="digits", raw_input_contents=[bytes(1 << 20)])
    request.inputs.add(name="input").contents.fp32_contents.extend([0.0] * 10_000)
    assert grpc_infer.parse_message(request.SerializeToString(), LIMITS).model_name == "digits"


@pytest.mark.parametrize(
    ("named_us", "call_ms", "default_ms", "earliest_ms"),
    [
        (None, None, None, None),
        (3000, None, 2.0, 3.0),  # the server's default holds for requests that name none
        (None, 50.0, None, 50.0),
        (3000, 50.0, None, 3.0),
        (3000, 2.0, 1.0, 2.0),
        (None, 60_000.0, 20.0, 20.0),
    ],
)
def test_the_earliest_deadline_counts(
    named_us: int | None, call_ms: float | None, default_ms: float | None, earliest_ms: float | None
) -> None:
    request = request_of() if named_us is None else request_of(mexit_deadline_us=named_us)
    message = grpc_infer.parse_message(request.SerializeToString(), LIMITS)
    parsed = grpc_infer.read_request(message, SPEC, LIMITS, call_ms, default_ms)
    assert parsed.options.get("deadline_ms") == earliest_ms
