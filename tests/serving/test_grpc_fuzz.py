"""Mutated messages against the parser of the Open Inference Protocol over gRPC, in this process."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from fuzzing import fuzz_seeds, mutate

from mexit.core.manifest import InputSpec, PrepareSpec
from mexit.errors import BadInput, TooLarge
from mexit.serving import grpc_infer, grpc_messages, oip
from mexit.serving.limits import Limits

SPEC = InputSpec("input", "float32", "NCHW", 1, (2, 2), (0.0, 1.0), PrepareSpec())
LIMITS = Limits(rows=4, head_bytes=400)
# Tags and lengths of fields, numbers of every length, groups, and texts.
_WORDS = [
    *(bytes([number << 3 | kind]) for number in range(1, 9) for kind in (0, 1, 2, 3, 4, 5)),
    *(b"\x00", b"\x01", b"\x7f", b"\x80\x01", b"\xff" * 9 + b"\x01", b"\xff" * 10, b"\xff\xff\xff\xff\x0f"),
    *(b"\x0a\x05input", b"\x12\x04FP32", b"\x1a\x04\x01\x01\x02\x02", b"\xed\xa0\x80", b"mexit_budget"),
]


def valid_messages() -> list[bytes]:
    """Raw and typed tensors of one and three rows, without and with parameters and requested outputs."""
    messages = []
    for rows in (1, 3):
        for is_raw in (True, False):
            for extra in (False, True):
                message = grpc_messages.new("ModelInferRequest", model_name="m", id="a" if extra else "")
                tensor = message.inputs.add(name="input", datatype="FP32", shape=[rows, *SPEC.shape])
                if is_raw:
                    message.raw_input_contents.append(np.full(4 * rows, 0.5, "<f4").tobytes())
                else:
                    tensor.contents.fp32_contents.extend([0.5] * 4 * rows)
                if extra:
                    message.parameters["mexit_budget"].string_param = "low"
                    message.parameters["timeout"].int64_param = 5
                    message.outputs.add(name="label")
                messages.append(message.SerializeToString())
    return messages


def fuzz(number: int, seed: int) -> Counter[str]:
    """Parse mutated messages; returns how many were accepted and refused.

    Every message is either parsed to a tensor within the limits, or refused as bad input, with a short message.
    """
    rng, messages, outcomes = random.Random(seed), valid_messages(), Counter[str]()
    for _ in range(number):
        content = mutate(rng.choice(messages), _WORDS, rng)
        deadline_ms = rng.choice((None, 5.0))
        try:
            message = grpc_infer.parse_message(content, LIMITS)
            parsed = grpc_infer.read_request(message, SPEC, LIMITS, deadline_ms, None)
        except (BadInput, TooLarge) as error:
            outcomes["refused" if len(str(error)) < 400 else "refused at length"] += 1
            continue
        assert parsed.tensor.dtype == np.float32, content
        assert parsed.tensor.shape[1:] == SPEC.shape, content
        assert 1 <= len(parsed.tensor) <= LIMITS.rows, content
        assert 0 <= parsed.tensor.min() <= parsed.tensor.max() <= 1, content
        assert set(parsed.outputs) <= set(oip.OUTPUTS), content
        outcomes["parsed"] += 1
    return outcomes


def test_mutated_messages() -> None:
    outcomes = fuzz(5000, seed=1)
    assert set(outcomes) == {"parsed", "refused"}
    assert min(outcomes["parsed"], outcomes["refused"]) > 500


@pytest.mark.long
def test_a_million_mutated_messages() -> None:
    assert set(fuzz_seeds("grpc", fuzz)) == {"parsed", "refused"}
