"""Request bodies: refused by their announced size, counted while they arrive, inflated under the same limit."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import anyio
from starlette.exceptions import HTTPException
from starlette.requests import Request

from mexit.errors import BadInput, TooLarge
from mexit.serving.limits import Limits
from mexit.serving.strict_json import shown

_WINDOW_BITS = {"gzip": 31, "deflate": 15}  # "deflate" in HTTP is the zlib format


async def read_body(request: Request, take: Callable[[int], None], limits: Limits) -> bytes:
    """The body as sent.

    Args:
        request: its body was not read yet.
        take: told how many bytes are kept, before they are.

    Raises:
        TooLarge: over the limit; by the announced size before a byte is read.
        BadInput: framed in two ways at once.
        HTTPException: 408, it took too long to arrive.
    """
    _check_announced(request, limits.body_bytes)
    content = bytearray()
    try:
        with anyio.fail_after(limits.body_s):
            async for chunk in request.stream():
                if len(content) + len(chunk) > limits.body_bytes:
                    raise _too_large("more", limits.body_bytes)
                take(len(chunk))
                content += chunk
    except TimeoutError:
        late = f"the body did not arrive within {limits.body_s:g} s"
        raise HTTPException(408, late, {"connection": "close"}) from None
    return bytes(content)


def inflate(content: bytes, encoding: str, limit: int) -> bytes:
    """Undo `Content-Encoding`. Raises `TooLarge` as soon as the limit is passed, `BadInput` for damage."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return content
    if encoding not in _WINDOW_BITS:
        raise BadInput(f"Content-Encoding must be gzip or deflate, found {shown(encoding)}")
    engine = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        plain = engine.decompress(content, limit + 1)
    except zlib.error:
        raise BadInput(f"the body is not valid {encoding}") from None
    if len(plain) > limit:
        raise _too_large(f"more after {encoding} is undone", limit)
    if not engine.eof or engine.unused_data:
        raise BadInput(f"the body is not one whole {encoding} stream")
    return plain


def _check_announced(request: Request, limit: int) -> None:
    lengths = request.headers.getlist("content-length")
    if lengths and "transfer-encoding" in request.headers:
        # Two proxies that believe different ones see different requests.
        raise BadInput("send Content-Length or Transfer-Encoding, not both")
    if any(int(length) > limit for length in lengths):
        raise _too_large(lengths[0], limit)


def _too_large(found: str, limit: int) -> TooLarge:
    return TooLarge(f"a request body has at most {limit} bytes, found {found}")
