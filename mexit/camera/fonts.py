"""A font for a text: Pillow's own where it has the letters, else one of the system's that has them.

Pillow's own knows ASCII alone, and class names come in every language.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import Any

# By name: Pillow looks in the font folders of the system.
SYSTEM_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf"),
    *("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "Arial Unicode.ttf", "PingFang.ttc", "msyh.ttc"),
)
_NO_LETTER = "\U0010ffff"


@lru_cache(maxsize=512)
def fitting(text: str, size: int) -> tuple[str, Any]:
    """The text and a font that can show it; where none can, the text without accents and other letters."""
    from PIL import ImageFont

    if text.isascii():
        return text, default(size)
    for name in SYSTEM_FONTS:
        try:
            font = ImageFont.truetype(name, size)
        except OSError:
            continue
        if _covers(font, text):
            return text, font
    bare = "".join(sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign))
    return bare.encode("ascii", "replace").decode(), default(size)


@lru_cache(maxsize=16)
def default(size: int) -> Any:
    """Pillow's own font."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _covers(font: Any, text: str) -> bool:
    """Whether no letter of the text comes out as the box that stands for a missing one."""
    box = _drawn(font, _NO_LETTER)
    return all(sign.isascii() or _drawn(font, sign) != box for sign in text)


def _drawn(font: Any, sign: str) -> tuple[Any, bytes]:
    mask = font.getmask(sign)
    return mask.size, bytes(mask)
