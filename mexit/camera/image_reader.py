"""Images: files on disk, or one on the web. The runtime gets their bytes, so that `data.preprocess` alone decides
what the network sees; the picture for people is decoded beside it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import numpy as np

from mexit.camera.frame import RGB, Counters, Frame, now
from mexit.data.preprocess import MAX_ENCODED_BYTES, read_image
from mexit.errors import Damaged, MexitError, NotFound, TooLarge


def image_file(path: Path, counters: Counters) -> Frame:
    """A shot that is read when it is loaded."""
    return _shot(str(path), lambda: _read(path), counters)


def web_image(address: str, name: str, counters: Counters, timeout_s: float) -> Frame:
    """A shot that is fetched when it is loaded. `name` is the address without credentials."""
    return _shot(name, lambda: _fetch(address, name, timeout_s), counters)


def picture(content: Any) -> RGB:
    """Encoded bytes, which `data.preprocess` has accepted before, as RGB (H, W, 3) uint8, upright."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    if image.mode.startswith("I"):  # Pillow would clip 16-bit greys, not scale them
        wide = np.asarray(image, np.int64)
        image = Image.fromarray((wide >> 8 if wide.max(initial=0) > 255 else wide).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return np.array(image.convert("RGB"), np.uint8)  # a copy: Pillow's own memory is read-only


def _shot(name: str, load: Callable[[], bytes], counters: Counters) -> Frame:
    return Frame(counters.arrive(), name, None, now(), counters.skipped, load, picture)


def _read(path: Path) -> bytes:
    try:
        return read_image(path)
    except NotFound as error:  # it was there when the folder was listed
        raise Damaged(str(error)) from None


def _fetch(address: str, name: str, timeout_s: float) -> bytes:
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(_request(address), timeout=timeout_s) as answer:
            content: bytes = answer.read(MAX_ENCODED_BYTES + 1)
    except URLError as error:  # its text may hold the address, so only the reason is passed on
        reason = getattr(error.reason, "strerror", None) or error.reason
        if getattr(error, "code", None) == 404:
            raise NotFound(f"{name} does not exist (404)") from None
        raise MexitError(f"{name} cannot be fetched: {reason}") from None
    except (OSError, ValueError) as error:
        raise MexitError(f"{name} cannot be fetched: {type(error).__name__}") from None
    if len(content) > MAX_ENCODED_BYTES:
        raise TooLarge(f"{name} has more than {MAX_ENCODED_BYTES} bytes")
    return content


def _request(address: str) -> Any:
    """urllib takes no credentials in an address: they travel in a header."""
    from urllib.request import Request

    parts = urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    request = Request(urlunsplit(parts._replace(netloc=host)))
    if at:
        request.add_unredirected_header("Authorization", "Basic " + _encoded(user))
    return request


def _encoded(user: str) -> str:
    return base64.b64encode(unquote(user).encode()).decode()
