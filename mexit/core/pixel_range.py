"""Lengths in the pixel range [0, 1], such as the radius of an attack, as text."""

from __future__ import annotations

LEVELS = 255
_TOLERANCE = 1e-9


def format_fraction(value: float) -> str:
    """Format a length in the pixel range: `8/255` for a whole number of the 255 levels, else `0.1`."""
    level = round(value * LEVELS)
    return f"{level}/{LEVELS}" if 0 < level < LEVELS and abs(value * LEVELS - level) < _TOLERANCE else f"{value:.6g}"
