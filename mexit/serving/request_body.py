"""Request bodies: receive, decompress and parse JSON, each within the server's limits."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

import anyio
import numpy as np

from mexit.errors import BadInput, TooLarge
from mexit.serving.asgi import HTTPError, Request
from mexit.serving.limits import Limits

_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # "deflate" in HTTP is the zlib format
_MAX_CODINGS = 4
_MAX_MEMBERS = 2048  # of a gzip body; a member takes 20 bytes and costs microseconds
_COMPRESSED_BYTES = 1 << 16  # what follows a member of gzip in a block of these bytes is copied
_BLOCK_BYTES = 1 << 20  # JSON is scanned in blocks, since the counters take several bytes per byte of text
_DEPTH_CHANGE = np.zeros(256, np.int8)
_DEPTH_CHANGE[[ord("["), ord("{")]], _DEPTH_CHANGE[[ord("]"), ord("}")]] = 1, -1
_STARTS_VALUE = np.zeros(256, np.bool_)
_STARTS_VALUE[[ord("["), ord("{"), ord(",")]] = True


async def read_body(request: Request, reserve: Callable[[int], None], limits: Limits) -> bytes:
    """Receive the body of a request, still compressed.

    Args:
        request: the request, its body unread.
        reserve: called with the size of each chunk before the chunk is stored, bytes.
        limits: `body_bytes` and `body_s` apply.

    Raises:
        TooLarge: the body exceeds the limit. An announced size is checked before anything is read.
        BadInput: both Content-Length and Transfer-Encoding are given.
        HTTPError: 408, the body did not arrive in time.
    """
    _check_announced_size(request, limits.body_bytes)
    content = bytearray()
    try:
        with anyio.fail_after(limits.body_s):
            async for chunk in request.chunks():
                if len(content) + len(chunk) > limits.body_bytes:
                    raise _too_large("more", limits.body_bytes)
                reserve(len(chunk))
                content += chunk
    except TimeoutError:
        message = f"the body did not arrive within {limits.body_s:g} s"
        raise HTTPError(408, message, {"connection": "close"}) from None
    return bytes(content)


def content_encoding(request: Request) -> str:
    """The codings of the body, separated by commas, in the order in which they were applied."""
    return ", ".join(request.header_values("content-encoding"))


def decompress(content: bytes, encoding: str, limit: int) -> bytes:
    """Undo a `Content-Encoding` (RFC 9110, section 8.4).

    Args:
        content: the body as sent.
        encoding: the codings, separated by commas, the last one applied last: "gzip" (RFC 1952), "deflate" (the zlib
            format, RFC 1950) or "identity".
        limit: size at most of the result, and after each coding, bytes.

    Raises:
        TooLarge: the result exceeds the limit; decompression stops there.
        BadInput: damaged data.
        HTTPError: 415, unknown coding; the header Accept-Encoding names the known ones (RFC 7694).
    """
    codings = [coding for part in encoding.split(",") if (coding := part.strip().lower()) not in ("", "identity")]
    if unknown := [coding for coding in codings if coding not in _WINDOW_BITS]:
        message = f"Content-Encoding must be gzip, deflate or identity, found {short_repr(unknown[0])}"
        raise HTTPError(415, message, {"accept-encoding": "gzip, deflate"})
    if len(codings) > _MAX_CODINGS:
        raise BadInput(f"a body has at most {_MAX_CODINGS} codings, found {len(codings)}")
    for coding in reversed(codings):
        content = _undo_coding(content, coding, limit)
    return content


def _undo_coding(content: bytes, coding: str, limit: int) -> bytes:
    """The data of one zlib stream, or of all members of a gzip body."""
    plain = bytearray()
    stream, members = zlib.decompressobj(_WINDOW_BITS[coding]), 1
    try:
        for start in range(0, len(content), _COMPRESSED_BYTES):
            rest = content[start : start + _COMPRESSED_BYTES]
            while rest:
                if stream.eof:
                    stream, members = zlib.decompressobj(_WINDOW_BITS[coding]), members + 1
                    if members > (1 if coding == "deflate" else _MAX_MEMBERS):
                        raise BadInput(f"the body is not one whole {coding} stream")
                plain += stream.decompress(rest, limit + 1 - len(plain))
                if len(plain) > limit:
                    raise _too_large(f"more after {coding} decompression", limit)
                rest = stream.unused_data
    except zlib.error:
        raise BadInput(f"the body is not valid {coding}") from None
    if not stream.eof:
        raise BadInput(f"the body is not one whole {coding} stream")
    return bytes(plain)


def parse_json(content: bytes, limits: Limits) -> Any:
    """Parse UTF-8 JSON strictly: no NaN, no Infinity, no repeated keys.

    Depth and number of values are checked before parsing.

    Raises:
        BadInput: not valid JSON, or nested too deep.
        TooLarge: more values than the limit.
    """
    _check_json_size(content, limits)
    try:
        text = content.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise BadInput(f"the JSON is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise BadInput(f"not valid JSON: {error}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits
        raise BadInput("not valid JSON: a number or a nesting that no reader takes") from None


def short_repr(value: object) -> str:
    """A client's value for an error message: 60 characters at most, lists and objects by their kind."""
    if isinstance(value, str | int | float | bool | None):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return "a JSON object" if isinstance(value, dict) else "a JSON list"


def _check_announced_size(request: Request, limit: int) -> None:
    lengths = request.header_values("content-length")
    if lengths and request.header_values("transfer-encoding"):
        # Two proxies that each believe another header see different requests (request smuggling).
        raise BadInput("send Content-Length or Transfer-Encoding, not both")
    if any(int(length) > limit for length in lengths):
        raise _too_large(lengths[0], limit)


def _check_json_size(content: bytes, limits: Limits) -> None:
    """Bound depth and values by counting brackets and commas, including those inside strings."""
    codes = np.frombuffer(content, np.uint8)
    depth = deepest = values = 0
    for start in range(0, len(codes), _BLOCK_BYTES):
        block = codes[start : start + _BLOCK_BYTES]
        depths = np.cumsum(_DEPTH_CHANGE[block], dtype=np.int32)
        deepest = max(deepest, depth + int(depths.max()))
        depth += int(depths[-1])
        values += int(np.count_nonzero(_STARTS_VALUE[block]))
        if deepest > limits.json_depth:
            raise BadInput(f"the JSON is nested deeper than {limits.json_depth} levels")
        if values > limits.json_values:
            raise TooLarge(f"the JSON holds more than {limits.json_values} values: send binary tensors instead")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise BadInput(f"the JSON names the key {short_repr(repeated)} twice")
    return entries


def _refuse_constant(name: str) -> NoReturn:
    raise BadInput(f"not valid JSON: {name}")


def _too_large(size: str, limit: int) -> TooLarge:
    return TooLarge(f"a request body has at most {limit} bytes, found {size}")
