"""Mutated binary requests against the parser of the Open Inference Protocol, in this process."""

from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
import pytest

from mexit.core.manifest import InputSpec, PrepareSpec
from mexit.errors import BadInput, TooLarge
from mexit.serving import oip
from mexit.serving.limits import Limits

SPEC = InputSpec("input", "float32", "NCHW", 1, (2, 2), (0.0, 1.0), PrepareSpec())
LIMITS = Limits(rows=4, json_values=200, json_depth=8)
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


def mutate(body: bytes, length: int | None, rng: random.Random) -> tuple[bytes, int | None]:
    """Change a few bytes, words or the length."""
    content = bytearray(body)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        at = rng.randrange(len(content) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at:at] = rng.choice(_WORDS)
        elif kind == 2:
            del content[at : at + rng.randrange(1, 20)]
        elif kind == 3:
            content[at : at + 8] = rng.randbytes(8)
        else:
            content[at:at] = content[rng.randrange(len(content) + 1) :][:40]
    if rng.random() < 0.2:
        length = rng.choice((None, 0, 1, len(content), rng.randrange(len(content) + 1)))
    return bytes(content), None if length is None else min(length, len(content))


def fuzz(number: int, seed: int) -> Counter[str]:
    """Parse mutated requests; returns how many were accepted and refused.

    Every request is either parsed to a tensor within the limits, or refused as bad input, with a short message.
    """
    rng, requests, outcomes = random.Random(seed), valid_requests(), Counter[str]()
    for _ in range(number):
        body, length = mutate(*rng.choice(requests), rng)
        try:
            parsed = oip.parse_request(body, length, SPEC, LIMITS)
        except (BadInput, TooLarge) as error:
            outcomes["refused" if len(str(error)) < 400 else "refused at length"] += 1
            continue
        assert parsed.tensor.dtype == np.float32, (body, length)
        assert parsed.tensor.shape[1:] == SPEC.shape, (body, length)
        assert 1 <= len(parsed.tensor) <= LIMITS.rows, (body, length)
        assert 0 <= parsed.tensor.min() <= parsed.tensor.max() <= 1, (body, length)
        assert set(parsed.outputs) <= set(oip.OUTPUTS), (body, length)
        outcomes["parsed"] += 1
    return outcomes


def test_mutated_binary_requests() -> None:
    outcomes = fuzz(5000, seed=1)
    assert set(outcomes) == {"parsed", "refused"}
    assert min(outcomes["parsed"], outcomes["refused"]) > 500


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_a_million_mutated_binary_requests(seed: int) -> None:
    """A hundred thousand for each of ten seeds."""
    assert set(fuzz(100_000, seed)) == {"parsed", "refused"}
