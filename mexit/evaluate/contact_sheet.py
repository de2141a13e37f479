"""Contact sheets: test images with their file name, true class, answer, confidence and exit."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mexit.core.printable import printable
from mexit.data.dataset import DataSet, FileImages
from mexit.data.preprocess import decode_rgb
from mexit.evaluate.answers import NO_ANSWER, Answers
from mexit.evaluate.fonts import class_label, draw_text, drawable, fit_width, wrap

PICTURES = 24  # per sheet
SIDE = 160  # pixels of a picture on the sheet
_COLUMNS, _GAP, _MARGIN = 6, 14, 24
_TEXT, _LINE, _TITLE, _SUBTITLE = 13, 17, 20, 16
_LINES = 7  # of the longest texts of a tile
_HEAD, _SUBHEAD = 48, 54  # heights of the title and of the two lines above each group
_TILE_HEIGHT = SIDE + 6 + _LINES * _LINE + _GAP
_ENLARGED = 64  # pictures up to this side are enlarged without smoothing, to show their pixels
_INK, _GREY, _GREEN, _RED, _PAPER = "#1b1f24", "#6a737d", "#1a7f37", "#b3261e", "#ffffff"


@dataclass(frozen=True)
class Tile:
    """One image of a contact sheet.

    Attributes:
        picture: the decoded image, at most `SIDE` pixels wide and high.
        file: its path below the data set's folder, or its position.
        true, predicted: class numbers; `predicted` is None without an answer.
        confidence: probability of the answer.
        exit: exit that answered, from 1.
    """

    picture: Image.Image
    file: str
    true: int
    predicted: int | None
    confidence: float
    exit: int

    @property
    def correct(self) -> bool:
        """Whether the answer is correct."""
        return self.predicted == self.true

    def to_json(self, classes: Sequence[str]) -> dict[str, Any]:
        """The row of the report, without the picture."""
        return {
            "file": self.file,
            "true": classes[self.true],
            "answer": None if self.predicted is None else classes[self.predicted],
            "confidence": self.confidence,
            "exit": self.exit,
        }


@dataclass(frozen=True)
class Sheet:
    """A titled group of tiles; `note` says how they were selected."""

    title: str
    note: str
    tiles: tuple[Tile, ...]


def tiles(answers: Answers, rows: NDArray[np.int64], data: DataSet) -> tuple[Tile, ...]:
    """Load the images of some answers.

    Args:
        answers: to N images.
        rows: rows of the answers to show, (B,).
        data: the data set that `Answers.index` refers to.
    """
    index = answers.index[rows]
    result = []
    for row, position, image in zip(rows.tolist(), index.tolist(), data.images.at(index), strict=True):
        picture = Image.fromarray(decode_rgb(image))
        picture.thumbnail((SIDE, SIDE))
        predicted = int(answers.predicted[row])
        result.append(
            Tile(
                picture,
                _file_name(data, position),
                int(answers.labels[row]),
                None if predicted == NO_ANSWER else predicted,
                float(answers.confidence[row]),
                int(answers.exits[row]),
            )
        )
    return tuple(result)


def picture_file(picture: Image.Image) -> tuple[bytes, str]:
    """A picture as a file and its MIME type: PNG for small ones, whose pixels count, else JPEG."""
    buffer = io.BytesIO()
    if max(picture.size) <= _ENLARGED:
        picture.save(buffer, "PNG", optimize=True)
        return buffer.getvalue(), "image/png"
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue(), "image/jpeg"


def contact_sheet(title: str, sheets: Sequence[Sheet], classes: Sequence[str]) -> bytes:
    """Draw groups of tiles below each other, as a PNG file."""
    width = 2 * _MARGIN + _COLUMNS * (SIDE + _GAP) - _GAP
    canvas = Image.new("RGB", (width, _MARGIN + _HEAD + sum(map(_height, sheets))), _PAPER)
    draw = ImageDraw.Draw(canvas)
    y = _MARGIN
    draw_text(draw, (_MARGIN, y), fit_width(drawable(title), _TITLE, width - 2 * _MARGIN), _TITLE, _INK)
    y += _HEAD
    for sheet in sheets:
        draw_text(draw, (_MARGIN, y), sheet.title, _SUBTITLE, _INK)
        draw_text(draw, (_MARGIN, y + _SUBTITLE + 6), sheet.note, _TEXT, _GREY)
        for number, tile in enumerate(sheet.tiles):
            row, column = divmod(number, _COLUMNS)
            at = (_MARGIN + column * (SIDE + _GAP), y + _SUBHEAD + row * _TILE_HEIGHT)
            _draw_tile(canvas, draw, at, tile, classes)
        if not sheet.tiles:
            draw_text(draw, (_MARGIN, y + _SUBHEAD), "none", _TEXT, _INK)
        y += _height(sheet)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _height(sheet: Sheet) -> int:
    rows = -(-len(sheet.tiles) // _COLUMNS)
    return _SUBHEAD + (rows * _TILE_HEIGHT if rows else 2 * _LINE) + _GAP


def _draw_tile(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, at: tuple[int, int], tile: Tile, classes: Sequence[str]
) -> None:
    """The picture on a frame, and lines of text below it: true class, answer, confidence and exit, file."""
    x, y = at
    picture = _fit(tile.picture)
    left, top = x + (SIDE - picture.width) // 2, y + (SIDE - picture.height) // 2
    draw.rectangle((x - 1, y - 1, x + SIDE, y + SIDE), outline="#d0d7de", fill="#f1f3f5")
    canvas.paste(picture, (left, top))
    answer = "no answer" if tile.predicted is None else class_label(tile.predicted, classes[tile.predicted])
    texts = (
        (f"true: {class_label(tile.true, classes[tile.true])}", _INK),
        (f"answer: {answer}", _GREEN if tile.correct else _RED),
        (f"{100 * tile.confidence:.1f} % at exit {tile.exit}", _INK),
        (drawable(tile.file), _GREY),
    )
    lines = [(line, colour) for text, colour in texts for line in wrap(text, _TEXT, SIDE + _GAP / 2)]
    for number, (line, colour) in enumerate(lines):
        draw_text(draw, (x, y + SIDE + 6 + number * _LINE), line, _TEXT, colour)


def _fit(picture: Image.Image) -> Image.Image:
    """Enlarge a picture to `SIDE`: small ones by a whole factor without smoothing."""
    if max(picture.size) >= SIDE:
        return picture
    scale = SIDE / max(picture.size)
    small = max(picture.size) <= _ENLARGED
    if small:
        scale = max(1, int(scale))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC)


def _file_name(data: DataSet, position: int) -> str:
    if isinstance(data.images, FileImages):
        return printable(data.images.names[position])
    return f"image {position}"
