"""What an annotated frame shows: label and confidence, the exit that answered, its cost of the full network.

White on a dark, slightly transparent panel, so that it can be read on any picture; sizes follow the frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mexit.camera import fonts
from mexit.camera.frame import RGB
from mexit.core.budget import format_macs
from mexit.runtime.prediction import Prediction

_PANEL = (12, 14, 18, 200)
_WHITE, _GREY, _TRACK = (255, 255, 255, 255), (206, 211, 218, 255), (92, 97, 106, 255)
# From cheap to dear; told apart by lightness too, for those who do not see the difference in hue.
_CHEAP, _DEAR = np.array([96, 224, 150]), np.array([255, 122, 66])
_SMALLEST, _LARGEST = 11, 34  # text height in pixels


class Overlay:
    """Draws predictions into frames.

    Args:
        cumulative_macs: cost of each exit, (E,); marks the exits on the cost bar.
    """

    def __init__(self, cumulative_macs: Sequence[int]) -> None:
        self._costs = tuple(cumulative_macs)

    def draw(self, frame: RGB, prediction: Prediction) -> RGB:
        """A copy of the frame, (H, W, 3) uint8, with the panel in its top left corner."""
        from PIL import Image

        picture = Image.fromarray(frame)
        height = min(max(round(min(picture.size) * 0.045), _SMALLEST), _LARGEST)
        panel = self._panel(prediction, height, picture.width - height)
        corner = (height // 2, height // 2)
        picture.paste(panel, corner, panel)
        return np.asarray(picture, np.uint8)

    def _panel(self, prediction: Prediction, height: int, widest: int) -> Any:
        from PIL import Image, ImageDraw

        label, title = fonts.fitting(prediction.label, round(height * 1.25))
        detail = fonts.default(height)
        room = widest - 2 * height
        percent = _percent(prediction.confidence)
        label = _shortened(label, title, room - title.getlength("  " + percent))
        lines = [_shortened(line, detail, room) for line in self._lines(prediction, detail, room)]
        inside = max(title.getlength(f"{label}  {percent}"), *(detail.getlength(line) for line in lines))
        size = (round(inside) + 2 * height, round(height * (3.5 + 1.35 * len(lines))))
        panel = Image.new("RGBA", size)
        pen = ImageDraw.Draw(panel)
        pen.rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), radius=height // 2, fill=_PANEL)
        pen.text((height, height * 0.6), label, font=title, fill=_WHITE)
        pen.text((size[0] - height, height * 0.6), percent, font=title, fill=_WHITE, anchor="ra")
        for row, line in enumerate(lines):
            pen.text((height, height * (2.25 + 1.35 * row)), line, font=detail, fill=_GREY)
        self._cost_bar(pen, (height, size[1] - height, size[0] - height), max(2, height // 4), prediction)
        return panel

    def _lines(self, prediction: Prediction, font: Any, room: float) -> list[str]:
        """Exit and cost, on one line if there is room."""
        full = prediction.macs + prediction.saved_macs
        exit_text = f"exit {prediction.exit} of {len(self._costs)}"
        if prediction.reason not in ("confident", "last"):
            exit_text += f" ({prediction.reason})"
        share = f"{100 * prediction.macs / full:.0f}% of full cost"
        long = f"{exit_text}  ·  {share} ({_plain(prediction.macs)} of {_plain(full)})"
        middle = f"{exit_text}  ·  {share}"
        if fitting := [line for line in (long, middle) if font.getlength(line) <= room]:
            return fitting[:1]
        return [exit_text, share]

    def _cost_bar(self, pen: Any, place: tuple[int, int, int], thick: int, prediction: Prediction) -> None:
        left, top, right = place
        full = prediction.macs + prediction.saved_macs
        share = prediction.macs / full
        colour = (*np.rint(_CHEAP + (_DEAR - _CHEAP) * share).astype(int).tolist(), 255)
        pen.rectangle((left, top, right, top + thick - 1), fill=_TRACK)
        pen.rectangle((left, top, left + round((right - left) * share), top + thick - 1), fill=colour)
        for cost in self._costs[:-1]:
            x = left + round((right - left) * cost / full)
            pen.line((x, top - thick // 2, x, top + thick - 1 + thick // 2), fill=_WHITE)


def _shortened(text: str, font: Any, room: float) -> str:
    """The text, cut with an ellipsis where it does not fit."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "...") > room:
        text = text[:-1]
    return text + "..."


def _percent(share: float) -> str:
    """Without decimals, and never more than there is."""
    return ">99%" if 0.995 <= share < 1 else f"{100 * share:.0f}%"


def _plain(macs: float) -> str:
    return format_macs(macs).removesuffix(" MACs")
