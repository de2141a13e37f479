"""The charts of the evaluation report in HTML and SVG, coloured by its style sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mexit.evaluate.confusion import Thinned
from mexit.evaluate.names import abbreviate

_LARGE = 16  # matrices up to this size have large cells
_NAME = 20  # characters of a class name beside the matrix: cells stay visible at the width of a phone
_TITLE = 200  # characters of the name that appears under the pointer
# Cells stronger than this have inverted text, in the dark and in the light style.
_INVERTED = {"inverted-dark": 0.65, "inverted-light": 0.88}
# The plot of a reliability diagram, in units of the SVG: left, top, width and height.
_LEFT, _TOP, _WIDTH, _HEIGHT = 44, 8, 200, 200


def matrix_table(thinned: Thinned, classes: Sequence[str]) -> str:
    """The confusion matrix as a table; cells count images and are coloured by their share of the true class."""
    names = [_name(classes[number]) for number in thinned.classes.tolist()]
    heads = "".join(f"<th scope=col>{name}</th>" for name in [*names, *map(_name, thinned.rest)])
    body = []
    for row, (name, counts, shades) in enumerate(zip(names, thinned.cells, thinned.shades, strict=True)):
        pairs = enumerate(zip(counts.tolist(), shades.tolist(), strict=True))
        cells = "".join(_cell(count, shade, row == column) for column, (count, shade) in pairs)
        body.append(f"<tr><th scope=row>{name}</th>{cells}</tr>")
    large = " large" if len(names) <= _LARGE else ""
    return (
        '<div class="scroll" role="region" tabindex="0" aria-label="Confusion matrix">'
        f'<table class="matrix{large}"><thead><tr><th class="corner">true \\ answer</th>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def reliability_chart(row: Mapping[str, Any]) -> str:
    """The reliability diagram of one exit, a row of `calibrate.temperature.reliability`, as a figure with SVG."""
    title = f"exit {row['exit']}: ECE {row['ece_before']:.3f} before, {row['ece']:.3f} after"
    total = max(1, sum(bin_["n"] for bin_ in row["bins"]))
    lines = _line(row["bins_before"], "before", total) + _line(row["bins"], "after", total)
    bottom = _TOP + _HEIGHT
    ticks = "".join(
        f'<text x="{_x(value):.0f}" y="{bottom + 15}" text-anchor="middle">{value:g}</text>'
        f'<text x="{_LEFT - 5}" y="{_y(value) + 4:.0f}" text-anchor="end">{value:g}</text>'
        for value in (0, 0.5, 1)
    )
    return (
        f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 260 244" role="img" aria-label="Reliability of '
        f'{title}"><rect class="axis" x="{_LEFT}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}"/>'
        f'<path class="ideal" d="M{_x(0):.0f} {_y(0):.0f}L{_x(1):.0f} {_y(1):.0f}"/>{lines}'
        f'{ticks}<text x="{_x(0.5):.0f}" y="{bottom + 30}" text-anchor="middle">confidence</text>'
        f'<text transform="translate(10 {_y(0.5):.0f}) rotate(-90)" text-anchor="middle">accuracy</text></svg></figure>'
    )


def _name(name: str) -> str:
    """A name without its middle if it is long; the pointer shows the whole one."""
    short, whole = abbreviate(name, _NAME), abbreviate(name, _TITLE)
    title = f' title="{escape(whole)}"' if short != name else ""
    return f"<bdi{title}>{escape(short)}</bdi>"


def _line(bins: Sequence[Mapping[str, float]], kind: str, total: int) -> str:
    """A line through the bins; the area of a point grows with the number of its images."""
    points = [(_x(bin_["confidence"]), _y(bin_["accuracy"])) for bin_ in bins]
    radii = [1.5 + 5 * (bin_["n"] / total) ** 0.5 for bin_ in bins]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    circles = "".join(
        f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'
        for (x, y), radius in zip(points, radii, strict=True)
    )
    return f'<path class="{kind}" d="M{path}"/>{circles}'


def _x(share: float) -> float:
    return _LEFT + _WIDTH * share


def _y(share: float) -> float:
    return _TOP + _HEIGHT * (1 - share)


def _cell(count: int, shade: float, correct: bool) -> str:
    if not count:
        return "<td></td>"
    kinds = ["c" if correct else "e", *(name for name, least in _INVERTED.items() if shade > least)]
    return f'<td class="{" ".join(kinds)}" style="--v:{shade:.2f}">{count}</td>'
