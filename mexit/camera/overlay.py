"""The panel drawn into annotated frames: label, confidence, exit, and share of the full network's cost.

Text is white on a dark, nearly opaque panel; sizes follow the frame. Pillow's default font covers ASCII only, so
labels are transliterated.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mexit.camera.frame import RGB
from mexit.camera.region import Region
from mexit.core.budget import format_macs
from mexit.runtime.prediction import POLICY_REASONS, UNSURE, Prediction

_PANEL = (12, 14, 18, 200)
_WHITE, _GREY, _TRACK = (255, 255, 255, 255), (206, 211, 218, 255), (92, 97, 106, 255)
# Colours of low and high cost. They differ in lightness too, for colour-blind viewers.
_LOW_COST, _HIGH_COST = np.array([96, 224, 150]), np.array([255, 122, 66])
_MIN_TEXT, _MAX_TEXT = 11, 34  # text height in pixels


class Overlay:
    """Draws predictions into frames."""

    def __init__(self, numbers: Sequence[int], cumulative_macs: Sequence[int], region: Region | None = None) -> None:
        """An overlay for one bundle.

        Args:
            numbers: number of each exit in the network, (E,).
            cumulative_macs: cost of leaving at each exit, (E,); it marks the exits on the cost bar.
            region: the part of each frame that is classified, to draw its outline; None: all of it.
        """
        self._last_exit, self._costs, self._region = numbers[-1], tuple(cumulative_macs), region

    def outline(self, frame: RGB) -> RGB:
        """The frame as it came, (H, W, 3) uint8, with the outline of the region; the same array without a region."""
        if self._region is None:
            return frame
        outlined = frame.copy()
        inner = self._region.crop(outlined)
        for colour in (_PANEL[:3], _WHITE[:3]):  # dark and light, to be seen on any frame
            inner[[0, -1]] = colour
            inner[:, [0, -1]] = colour
            inner = inner[1:-1, 1:-1]
            if not inner.size:
                break
        return outlined

    def draw(self, frame: RGB, prediction: Prediction) -> RGB:
        """A copy of the frame, (H, W, 3) uint8, with the panel in its top left corner."""
        from PIL import Image

        image = Image.fromarray(frame)
        height = min(max(round(min(image.size) * 0.045), _MIN_TEXT), _MAX_TEXT)
        panel = self._panel(prediction, height, image.width - height)
        corner = (height // 2, height // 2)
        image.paste(panel, corner, panel)
        return np.asarray(image, np.uint8)

    def _panel(self, prediction: Prediction, height: int, max_width: int) -> Any:
        """The panel as an RGBA image; `height` is that of the text, pixels."""
        from PIL import Image, ImageDraw, ImageFont

        title, detail = ImageFont.load_default(round(height * 1.25)), ImageFont.load_default(height)
        room = max_width - 2 * height
        percent = "" if prediction.label is None else format_confidence(prediction.confidence)
        label_room = room - title.getlength("  " + percent)
        label = _shorten(to_ascii(prediction.label or UNSURE), title.getlength, label_room)
        lines = [
            _shorten(line, detail.getlength, room)
            for line in describe_cost(prediction, self._last_exit, detail.getlength, room)
        ]
        text_width = max(title.getlength(f"{label}  {percent}"), *(detail.getlength(line) for line in lines))
        size = (round(text_width) + 2 * height, round(height * (3.5 + 1.35 * len(lines))))
        panel = Image.new("RGBA", size)
        canvas = ImageDraw.Draw(panel)
        canvas.rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), radius=height // 2, fill=_PANEL)
        canvas.text((height, height * 0.6), label, font=title, fill=_WHITE)
        canvas.text((size[0] - height, height * 0.6), percent, font=title, fill=_WHITE, anchor="ra")
        for row, line in enumerate(lines):
            canvas.text((height, height * (2.25 + 1.35 * row)), line, font=detail, fill=_GREY)
        self._cost_bar(canvas, (height, size[1] - height, size[0] - height), max(2, height // 4), prediction)
        return panel

    def _cost_bar(self, canvas: Any, position: tuple[int, int, int], height: int, prediction: Prediction) -> None:
        left, top, right = position
        full = max(prediction.macs + prediction.saved_macs, self._costs[-1])  # of side heads, if all segments run
        share = prediction.macs / full
        colour = (*np.rint(_LOW_COST + (_HIGH_COST - _LOW_COST) * share).astype(int).tolist(), 255)
        canvas.rectangle((left, top, right, top + height - 1), fill=_TRACK)
        canvas.rectangle((left, top, left + round((right - left) * share), top + height - 1), fill=colour)
        for cost in self._costs[:-1]:
            x = left + round((right - left) * cost / full)
            canvas.line((x, top - height // 2, x, top + height - 1 + height // 2), fill=_WHITE)


def describe_cost(prediction: Prediction, exits: int, width_of: Callable[[str], float], room: float) -> list[str]:
    """Exit and cost of a prediction, as one line if it fits, else two.

    Args:
        prediction: the prediction.
        exits: number of the last exit in the network.
        width_of: returns the width of a text, pixels.
        room: available width, pixels.
    """
    full = prediction.macs + prediction.saved_macs
    exit_text = f"exit {prediction.exit} of {exits}"
    if prediction.reason not in (*POLICY_REASONS, UNSURE):
        exit_text += f" ({prediction.reason})"
    share = f"{100 * prediction.macs / full:.0f}% of full cost"
    macs, full_macs = (format_macs(cost).removesuffix(" MACs") for cost in (prediction.macs, full))
    one_line = f"{exit_text}  ·  {share}"
    for line in (f"{one_line} ({macs} of {full_macs})", one_line):
        if width_of(line) <= room:
            return [line]
    return [exit_text, share]


def format_confidence(confidence: float) -> str:
    """A confidence in percent without decimals; below 1 it is never shown as 100%."""
    return ">99%" if 0.995 <= confidence < 1 else f"{100 * confidence:.0f}%"


def to_ascii(text: str) -> str:
    """The text with accents removed; other characters outside ASCII become `?`."""
    letters = (char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    return "".join(letters).encode("ascii", "replace").decode()


def _shorten(text: str, width_of: Callable[[str], float], room: float) -> str:
    """The text, cut with an ellipsis if it does not fit."""
    if width_of(text) <= room:
        return text
    while text and width_of(text + "...") > room:
        text = text[:-1]
    return text + "..."
