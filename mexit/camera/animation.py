"""The frames of animated pictures: GIF, WebP, APNG and AVIF."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mexit.data.preprocess import open_image
from mexit.errors import MexitError

if TYPE_CHECKING:
    from PIL import Image

_ANIMATED = ("GIF", "WEBP", "PNG", "AVIF", "HEIF")
_USUAL_DURATION_S = 0.1  # of a frame that has none, as browsers show it


def open_picture(content: bytes) -> Image.Image | None:
    """The picture of encoded bytes, not decoded yet; None if it cannot be read, or is too large."""
    try:
        return open_image(content)
    except MexitError:  # decoding explains it
        return None


def is_animated(picture: Any) -> bool:
    """Whether a picture of Pillow is a film, and not pages, layers or a preview."""
    try:
        return picture.format in _ANIMATED and bool(picture.is_animated)
    except Exception:  # a damaged file, of which the first frame may be readable
        return False


def pages(picture: Any) -> int:
    """Number of pages of a TIFF file, 1 for other pictures."""
    try:
        return int(picture.n_frames) if picture.format == "TIFF" else 1
    except Exception:  # a damaged directory of pages
        return 1


def read_frames(picture: Any) -> Iterator[tuple[float, Any]]:
    """The frames of an animated picture and their times from its start, seconds.

    The still picture of an APNG file that is not part of its film is left out.

    Yields:
        Time and frame, a Pillow image.

    Raises:
        OSError, SyntaxError, ValueError: a damaged frame, from Pillow.
    """
    time_s = 0.0
    for number in range(int(bool(picture.info.get("default_image"))), picture.n_frames):
        picture.seek(number)
        picture.load()
        yield time_s, picture.copy()
        time_s += (picture.info.get("duration") or 1e3 * _USUAL_DURATION_S) / 1e3
