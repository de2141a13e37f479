"""The region of interest: the part of a picture that the network sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mexit.camera.frame import RGB
from mexit.errors import BadInput, UsageError

_EXPECTED = "expected x,y,width,height as shares of the picture from 0 to 1, or in pixels"


@dataclass(frozen=True)
class Region:
    """A rectangle with edges parallel to those of the picture.

    Attributes:
        x, y: left and upper edge.
        width, height: its size, above 0.

    If no number is above 1, all are shares of the picture's width and height; else all are pixels.
    """

    x: float
    y: float
    width: float
    height: float

    def __post_init__(self) -> None:
        values = (self.x, self.y, self.width, self.height)
        text = ",".join(f"{value:g}" for value in values)
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise UsageError(f"region {text}: {_EXPECTED}; no number may be below 0")
        if not (self.width and self.height):
            raise UsageError(f"region {text} is empty; width and height must be above 0")
        if self.in_shares and (self.x + self.width > 1 + 1e-9 or self.y + self.height > 1 + 1e-9):
            raise UsageError(f"region {text} ends outside the picture; x + width and y + height must be at most 1")
        if not self.in_shares and any(value != round(value) for value in values):
            raise UsageError(f"region {text} mixes shares and pixels; {_EXPECTED}")

    @property
    def in_shares(self) -> bool:
        """Whether the numbers are shares of the picture; otherwise they are pixels."""
        return max(self.x, self.y, self.width, self.height) <= 1

    @classmethod
    def of(cls, values: Sequence[float]) -> Region:
        """A region of four numbers: x, y, width, height. Raises `UsageError`."""
        if len(values) != 4:
            raise UsageError(f"a region has 4 numbers, found {len(values)}; {_EXPECTED}")
        return cls(*values)

    @classmethod
    def parse(cls, text: str) -> Region:
        """A region in the notation `x,y,width,height`, such as `0.25,0.1,0.5,0.5`. Raises `UsageError`."""
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            raise UsageError(f"region {text!r}: {_EXPECTED}, such as 0.25,0.1,0.5,0.5") from None
        return cls.of(values)

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the region in a picture of that size, pixels.

        Shares are rounded to whole pixels, at least one. A region in pixels ends at the edge of a smaller picture.

        Raises:
            BadInput: the region lies outside the picture.
        """
        sx, sy = (width, height) if self.in_shares else (1, 1)
        left, top = math.floor(self.x * sx + 1e-6), math.floor(self.y * sy + 1e-6)
        right, bottom = math.ceil((self.x + self.width) * sx - 1e-6), math.ceil((self.y + self.height) * sy - 1e-6)
        if left >= width or top >= height:
            text = f"{left},{top},{right - left},{bottom - top}"
            raise BadInput(f"the region {text} lies outside the picture of {width} x {height} pixels")
        return left, top, min(right, width), min(bottom, height)

    def crop(self, rgb: RGB) -> RGB:
        """The region of a picture, (H, W, 3) uint8, as a view. Raises `BadInput` if it lies outside."""
        left, top, right, bottom = self.box(rgb.shape[0], rgb.shape[1])
        return rgb[top:bottom, left:right]
