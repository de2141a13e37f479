"""Mutated requests against the parser of the Open Inference Protocol over HTTP, in this process."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections import Counter

import numpy as np
import pytest
from fuzzing import fuzz_seeds, mutate

from mexit.core.manifest import InputSpec, PrepareSpec
from mexit.errors import BadInput, TooLarge
from mexit.serving import oip
from mexit.serving.asgi import HTTPError
from mexit.serving.limits import Limits
from mexit.serving.request_body import decompress

SPEC = InputSpec("input", "float32", "NCHW", 1, (2, 2), (0.0, 1.0), PrepareSpec())
LIMITS = Limits(rows=4, json_values=200, json_depth=8, body_bytes=4096)
_WORDS = [
    *(b'"inputs"', b'"shape"', b'"data"', b'"outputs"', b'"parameters"', b'"binary_data_size"', b'"binary_data"'),
    *(b"null", b"true", b"NaN", b"1e999", b"-1", b"18446744073709551616", b'"\\ud800"'),
    *(b"[", b"]", b"{", b"}", b",", b":"),
]


def valid_requests() -> list[tuple[bytes, int | None]]:
    """Bodies and the length of their JSON part: binary, raw and JSON."""
    requests: list[tuple[bytes, int | None]] = [(bytes(16), 0)]
    for rows in (1, 3):
        shape = [rows, *SPEC.shape]
        entry = {"name": "input", "shape": shape, "datatype": "FP32", "parameters": {"binary_data_size": 16 * rows}}
        for extra in ({}, {"id": "a", "outputs": [{"name": "label", "parameters": {"binary_data": True}}]},
                      {"parameters": {"mexit_budget": "low", "timeout": 5, "binary_data_output": True}}):  # fmt: skip
            head = json.dumps({"inputs": [entry], **extra}).encode()
            requests.append((head + np.full(shape, 0.5, "<f4").tobytes(), len(head)))
        flat = {"name": "input", "shape": shape, "datatype": "FP32", "data": [0.5] * 4 * rows}
        requests.append((json.dumps({"inputs": [flat]}).encode(), None))
    return requests


def mutate_request(body: bytes, length: int | None, rng: random.Random) -> tuple[bytes, list[str], str]:
    """The body, the values of the header of its JSON part's length, and its coding."""
    content, coding = mutate(body, _WORDS, rng), ""
    values = [] if length is None else [str(length)]
    if rng.random() < 0.2:
        values = [
            rng.choice(("0", "1", "-1", "", "1e3", "9" * 30, str(len(content)), str(rng.randrange(len(content) + 2))))
        ]
    if rng.random() < 0.02:
        values = [*values, "0"]
    if rng.random() < 0.1:
        coding = rng.choice(("gzip", "deflate", "gzip, deflate", "br", "identity"))
        content = gzip.compress(content, 1) if rng.random() < 0.7 else zlib.compress(content, 1)
        content = mutate(content, _WORDS, rng) if rng.random() < 0.3 else content
    return content, values, coding


def fuzz(number: int, seed: int) -> Counter[str]:
    """Parse mutated requests; returns how many were accepted and refused.

    Every request is either parsed to a tensor within the limits, or refused as bad input, with a short message.
    """
    rng, requests, outcomes = random.Random(seed), valid_requests(), Counter[str]()
    for _ in range(number):
        case = mutate_request(*rng.choice(requests), rng)
        body, values, coding = case
        try:
            plain = decompress(body, coding, LIMITS.body_bytes)
            parsed = oip.parse_request(plain, oip.parse_header_length(values, len(plain)), SPEC, LIMITS)
        except (BadInput, TooLarge, HTTPError) as error:
            outcomes["refused" if len(str(error)) < 400 else "refused at length"] += 1
            continue
        assert parsed.tensor.dtype == np.float32, case
        assert parsed.tensor.shape[1:] == SPEC.shape, case
        assert 1 <= len(parsed.tensor) <= LIMITS.rows, case
        assert 0 <= parsed.tensor.min() <= parsed.tensor.max() <= 1, case
        assert set(parsed.outputs) <= set(oip.OUTPUTS), case
        outcomes["parsed"] += 1
    return outcomes


def test_mutated_binary_requests() -> None:
    outcomes = fuzz(5000, seed=1)
    assert set(outcomes) == {"parsed", "refused"}
    assert min(outcomes["parsed"], outcomes["refused"]) > 500


@pytest.mark.long
def test_a_million_mutated_binary_requests() -> None:
    assert set(fuzz_seeds("binary", fuzz)) == {"parsed", "refused"}
