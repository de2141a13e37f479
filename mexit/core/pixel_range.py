"""Lengths in the pixel range [0, 1], such as the radius of an attack, as text."""

from __future__ import annotations

LEVELS = 255
_TOLERANCE = 1e-9


def format_fraction(value: float) -> str:
    """Format a length in the pixel range as it was typed: `0.1`, or `8/255` for a number of the 255 levels."""
    level = round(value * LEVELS)
    if float(f"{value:.6g}") != value and 0 < level < LEVELS and abs(value * LEVELS - level) < _TOLERANCE:
        return f"{level}/{LEVELS}"
    return f"{value:.6g}"
