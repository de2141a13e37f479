"""Decompression and JSON parsing, up to their exact limits."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mexit.errors import BadInput, TooLarge
from mexit.serving.limits import Limits
from mexit.serving.request_body import decompress, parse_json

LIMITS = Limits(json_values=40, json_depth=4)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text('ab"\\\u20ac\U0001f600', max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_the_depth_limit_is_exact(opening: str) -> None:
    closing = "]" if opening == "[" else "}"
    parse_json((opening * 4 + "1" + closing * 4).encode(), LIMITS)
    with pytest.raises(BadInput, match="deeper than 4 levels"):
        parse_json((opening * 5 + "1" + closing * 5).encode(), LIMITS)


def test_depth_in_a_long_text() -> None:
    """The text is scanned in blocks; depth is counted across them."""
    gap = b" " * 400_000
    parse_json(gap.join([b"[" * 3, b"[1]", b"]" * 3, b""]), LIMITS)
    parse_json(b"[" + gap.join([b"[[1]]"] + [b",[[1]]"] * 9) + b"]", LIMITS)
    with pytest.raises(BadInput, match="deeper"):
        parse_json(gap.join([b"["] * 5 + [b"1"] + [b"]"] * 5), LIMITS)


def test_the_value_limit_is_exact() -> None:
    parse_json(json.dumps([0] * 40).encode(), LIMITS)
    with pytest.raises(TooLarge, match="more than 40 values"):
        parse_json(json.dumps([0] * 41).encode(), LIMITS)


@given(JSON)
@settings(max_examples=60, deadline=None)
def test_valid_json_equals_the_standard_library(value: object) -> None:
    content = json.dumps(value).encode()
    assert parse_json(content, Limits(json_depth=500)) == json.loads(content)


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_the_size_limit_is_exact(encoding: str, compress: Callable[[bytes], bytes]) -> None:
    assert decompress(compress(b"x" * 1000), f" {encoding.upper()} ", 1000) == b"x" * 1000
    with pytest.raises(TooLarge, match="at most 999 bytes"):
        decompress(compress(b"x" * 1000), encoding, 999)


@pytest.mark.parametrize(
    ("encoding", "sent"),
    [
        ("", b"plain"),
        ("identity", b"plain"),
        ("X-GZIP", gzip.compress(b"plain")),
        ("gzip, identity,, ", gzip.compress(b"plain")),
        ("gzip", gzip.compress(b"pl") + gzip.compress(b"") + gzip.compress(b"ain")),
        ("gzip, deflate", zlib.compress(gzip.compress(b"plain"))),
        ("deflate,gzip,gzip", gzip.compress(gzip.compress(zlib.compress(b"plain")))),
    ],
    ids=["none", "identity", "other name", "empty names", "members", "two", "three"],  # gzip holds the time
)
def test_codings_of_the_rfcs(encoding: str, sent: bytes) -> None:
    """Several codings are undone from the last one; a gzip body may have several members."""
    assert decompress(sent, encoding, 100) == b"plain"


def test_the_size_after_each_coding_is_bounded() -> None:
    bomb = gzip.compress(gzip.compress(b"0" * 10**6))
    with pytest.raises(TooLarge):
        decompress(bomb, "gzip, gzip", 10**5)


def test_members_and_lengths_at_the_borders_of_blocks() -> None:
    """Compressed data is read in blocks of 64 KiB."""
    noise = random.Random(1).randbytes(200_000)
    members = gzip.compress(noise) + gzip.compress(noise[:1]) + gzip.compress(noise)
    assert decompress(members, "gzip", 500_000) == noise + noise[:1] + noise
    with pytest.raises(TooLarge):
        decompress(members, "gzip", 400_000)
    with pytest.raises(BadInput, match="not one whole gzip stream"):
        decompress(members[:-1], "gzip", 500_000)
    with pytest.raises(BadInput, match="not one whole gzip stream"):
        decompress(gzip.compress(b"") * 5000, "gzip", 500_000)
