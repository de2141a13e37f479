"""Parsing of requests of the Open Inference Protocol, without a server."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mexit.core.manifest import InputSpec, PrepareSpec
from mexit.errors import BadInput, MexitError
from mexit.serving import oip
from mexit.serving.limits import Limits
from mexit.serving.request_options import PARAMETERS, options_from_parameters

SPEC = InputSpec("input", "float32", "NCHW", 3, (2, 4), (0.0, 1.0), PrepareSpec())
LIMITS = Limits(rows=2, json_values=40, json_depth=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("ab\u20ac", max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries({"name": st.just("input") | JSON, "shape": JSON, "data": JSON})


@given(st.binary(max_size=400), st.none() | st.integers(0, 400))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_bad_input(body: bytes, length: int | None) -> None:
    if length is not None and length > len(body):
        length = len(body)
    with pytest.raises(BadInput):
        oip.parse_request(body, length, SPEC, LIMITS)


@given(
    st.fixed_dictionaries(
        {"inputs": st.lists(ENTRY, max_size=2)},
        optional={"parameters": JSON, "outputs": JSON, "id": JSON},
    )
)
@settings(max_examples=60, deadline=None)
def test_random_requests_are_bad_input(request: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        oip.parse_request(json.dumps(request).encode(), None, SPEC, Limits(json_depth=500))


@given(st.dictionaries(st.sampled_from([*PARAMETERS, "timeout", "priority"]), JSON))
@settings(max_examples=60, deadline=None)
def test_random_options_are_read_or_bad_input(parameters: dict[str, object]) -> None:
    try:
        options = options_from_parameters(parameters)
    except MexitError as error:
        refusal = error
    else:
        deadline_ms = options.get("deadline_ms")
        assert deadline_ms is None or 0 < deadline_ms < 1e12
        return
    assert refusal.http_status == 400
    assert len(str(refusal)) < 300


@pytest.mark.parametrize(
    ("parameters", "deadline_ms"),
    [
        ({"timeout": 5000, "mexit_deadline_us": 3000}, 3.0),
        ({"timeout": 0, "mexit_deadline_us": 3000}, 3.0),
        ({"timeout": 2000}, 2.0),
        ({"timeout": 0}, None),
    ],
)
def test_the_earlier_deadline_counts(parameters: dict[str, object], deadline_ms: float | None) -> None:
    assert options_from_parameters(parameters).get("deadline_ms") == deadline_ms


@pytest.mark.parametrize("timeout", [False, "", "0", -1])
def test_invalid_timeouts(timeout: object) -> None:
    with pytest.raises(BadInput, match="timeout must be a number above zero"):
        options_from_parameters({"timeout": timeout})


def test_an_unaligned_tensor() -> None:
    """The tensor follows a JSON text of any length, so its floats start at any address."""
    pixels = np.random.default_rng(0).random((2, 3, 2, 4), np.float32)
    entry = {"name": "input", "shape": [2, 3, 2, 4], "datatype": "FP32", "parameters": {"binary_data_size": 192}}
    for padding in range(4):
        head = json.dumps({"inputs": [entry]}).encode() + b" " * padding
        request = oip.parse_request(head + pixels.tobytes(), len(head), SPEC, LIMITS)
        np.testing.assert_array_equal(request.tensor, pixels)
        assert request.tensor.flags.aligned
