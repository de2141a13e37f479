"""The body of a `/v1/classify` request: the bytes of an image, or JSON that holds them as base64."""

from __future__ import annotations

import base64
import binascii
import re
from typing import NoReturn

from mexit.errors import BadInput
from mexit.serving.limits import Limits
from mexit.serving.request_body import parse_json, short_repr

HOW_TO_SEND = 'send the bytes of the image (curl --data-binary @image.png), or JSON {"image": "BASE64"}'
_DATA_URL = re.compile(r"data:[^,]{0,100};base64,")
_PNG, _PNG_START = b"\x89PNG\r\n\x1a\n", b"\x89PNG"
_TEXT_BYTES = 4096  # of a body, to see whether it is text


def image_bytes(body: bytes, limits: Limits) -> bytes:
    """The encoded image of a body.

    Args:
        body: the decompressed body: an image file, or a JSON object `{"image": "..."}` with its bytes as base64 or
            as a data URL.
        limits: `json_values` and `json_depth` apply.

    Raises:
        BadInput: the body is empty, or text in another form; the message says what to send.
    """
    if not body:
        raise BadInput(f"the body is empty: {HOW_TO_SEND}")
    if body[:1] in (b"{", b"["):
        return _from_json(body, limits)
    if body.startswith(_PNG_START) and not body.startswith(_PNG):
        raise BadInput(f"the PNG lost its line ends on the way, as with curl -d: {HOW_TO_SEND}")
    start = body[:_TEXT_BYTES]
    if start.isascii() and start.decode().isprintable():
        _refuse_text(start.decode())
    return body


def _from_json(body: bytes, limits: Limits) -> bytes:
    value = parse_json(body, limits)
    text = value.get("image") if isinstance(value, dict) else None
    if not isinstance(text, str) or len(value) > 1:
        found = f"the keys {', '.join(map(short_repr, [*value][:5]))}" if isinstance(value, dict) else short_repr(value)
        raise BadInput(
            f'JSON must be {{"image": "BASE64"}}, found {found}; options are in the query, such as ?budget=low'
        )
    try:
        return base64.b64decode(_DATA_URL.sub("", text, count=1), validate=True)
    except (ValueError, binascii.Error) as error:
        raise BadInput(f'"image" is not base64 ({error}): encode the bytes of the image file') from None


def _refuse_text(text: str) -> NoReturn:
    is_base64 = _DATA_URL.match(text) or (len(text) > 20 and re.fullmatch(r"[A-Za-z0-9+/_-]+=*", text))
    kind = "base64" if is_base64 else f"the text {short_repr(text)}"
    raise BadInput(f"the body is {kind}, not an image: {HOW_TO_SEND}")
