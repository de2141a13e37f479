"""Fonts for class names and file names in any script, from the fonts of this system."""

from __future__ import annotations

import importlib.util
import os
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import ImageDraw, ImageFont

from mexit.core.printable import printable
from mexit.evaluate.names import abbreviate

# Files of fonts with many characters, the preferred first. Every system has some of them, or none.
_FILES = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "SegoeUI.ttf", "segoeui.ttf",
    "NotoSansCJK-Regular.ttc", "NotoSansCJKjp-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf", "DroidSansFallback.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc",
    "YuGothM.ttc", "malgun.ttf", "AppleSDGothicNeo.ttc", "Arial Unicode.ttf", "NotoSansArabic-Regular.ttf",
    "NotoSansHebrew-Regular.ttf", "NotoSansDevanagari-Regular.ttf", "NotoSansThai-Regular.ttf", "Nirmala.ttf",
    "LeelawUI.ttf", "Kohinoor.ttc", "Thonburi.ttc", "unifont.ttf", "unifont.otf",
)  # fmt: skip
_NEVER_ASSIGNED = "\U0010ffff"  # drawn as the font's sign for a missing character
_DRAWN_SIZE = 16  # any size shows whether a font has a character

Font = ImageFont.FreeTypeFont


def drawable(text: str) -> str:
    """One line of text, with "?" for each character that no font of this system has."""
    shown: list[str] = []
    for char in printable(text):
        known = char == " " or _font_file(char) is not None
        if known or not unicodedata.category(char).startswith("M"):  # a mark belongs to the character before it
            shown.append(char if known else "?")
    return "".join(shown)


def class_label(number: int, name: str) -> str:
    """A class name as a picture can show it; the class number is added if the fonts lack a character."""
    shown = drawable(name)
    return shown if shown == name else f"{shown} (class {number})"


def font_files() -> tuple[Path, ...]:
    """The font files that text is drawn with, the preferred first; empty if the system has none of those known."""
    found: dict[str, Path] = {}
    for folder in _folders():
        for path in _walk(folder):
            found.setdefault(path.name, path)
    return tuple(found[name] for name in _FILES if name in found)


def draw_text(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, fill: str) -> None:
    """Draw one line of text, each part of it in the first font that has its characters; `at` is its upper left."""
    x, baseline = at[0], at[1] + size
    for part, font in _runs(text, size):
        draw.text((x, baseline), part, font=font, fill=fill, anchor="ls")
        x += font.getlength(part)


def text_width(text: str, size: int) -> float:
    """The width of a line of text in pixels."""
    return sum(font.getlength(part) for part, font in _runs(text, size))


def fit_width(text: str, size: int, width: float) -> str:
    """The text, abbreviated to at most `width` pixels."""
    kept = len(text)
    while kept > 5 and text_width(abbreviate(text, kept), size) > width:
        kept = max(5, min(kept - 1, int(kept * 0.95)))
    return abbreviate(text, kept) if kept < len(text) else text


def wrap(text: str, size: int, width: float, most: int = 2) -> list[str]:
    """The text on at most `most` lines of at most `width` pixels, broken after spaces or else slashes if it can."""
    lines: list[str] = []
    while len(lines) < most - 1 and text_width(text, size) > width:
        end = next(end for end in range(len(text), 0, -1) if end == 1 or text_width(text[:end], size) <= width)
        start = end // 3  # a first line is not much shorter than it can be
        end = text.rfind(" ", start, end) + 1 or text.rfind("/", start, end) + 1 or end
        lines.append(text[:end].rstrip())
        text = text[end:]
    return [*lines, fit_width(text, size, width)]


def _runs(text: str, size: int) -> Iterator[tuple[str, Font]]:
    """Parts of the text that are drawn in one font each."""
    part, file = "", None
    for char in text:
        own = file if char == " " else _font_file(char) or _base_file()
        if part and own != file:
            yield part, _font(file, size)
            part = ""
        part, file = part + char, own
    if part:
        yield part, _font(file or _base_file(), size)


@cache
def _font_file(char: str) -> str | None:
    """The first font that has a character; "" is Pillow's own font, which has ASCII alone."""
    return next((file for file in _files() if _has(_font(file, _DRAWN_SIZE, True), char)), None)


def _base_file() -> str:
    return _files()[0]


@cache
def _files() -> tuple[str, ...]:
    return (*map(str, font_files()), "")


@cache
def _font(file: str | None, size: int, single: bool = False) -> Font:
    """A font of `size` pixels; `single` draws each character by itself, without the shapes of its script."""
    engine = ImageFont.Layout.BASIC if single else None
    if file:
        return ImageFont.truetype(file, size, layout_engine=engine)
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _has(font: Font, char: str) -> bool:
    mask, missing = font.getmask(char), font.getmask(_NEVER_ASSIGNED)
    return mask.size != missing.size or bytes(mask) != bytes(missing)


def _folders() -> list[Path]:
    """Folders of fonts on Linux, macOS and Windows, and matplotlib's own."""
    home = Path.home()
    folders = [Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), home / ".fonts", home / ".local/share/fonts"]
    if sys.platform == "darwin":
        folders += [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    if sys.platform == "win32":
        folders.append(Path(os.environ.get("WINDIR", r"C:\Windows")) / "Fonts")
    package = importlib.util.find_spec("matplotlib")
    if package is not None and package.origin is not None:
        folders.append(Path(package.origin).parent / "mpl-data" / "fonts" / "ttf")
    return folders


def _walk(folder: Path) -> Iterator[Path]:
    for root, _, files in os.walk(folder):
        yield from (Path(root) / name for name in files)
