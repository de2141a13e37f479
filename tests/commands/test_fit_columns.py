"""Columns that fit a terminal: long cells are shortened in the middle, and columns are dropped."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from mexit.commands.fit_columns import GAP, SHORT, fit, shorten_middle

NAMES = ["label", "score", "MACs", "image"]
LABEL, IMAGE = "No passing for vehicles over 3.5 t", "folder-with-a-long-name-00010_00066.webp"


def fitted(width: int, *rows: list[str]) -> tuple[list[list[str]], tuple[str, ...]]:
    lines, dropped = fit([NAMES, *rows], width, drop=("MACs", "score"), shorten=("label", "image"))
    sizes = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    assert sum(sizes) + GAP * (len(sizes) - 1) <= width
    return lines, dropped


def test_what_fits_stays_whole() -> None:
    rows = [["Stop", "99.1%", "6.3M", "a.png"], [LABEL, "1.0%", "18M", IMAGE]]
    assert fitted(100, *rows) == ([NAMES, *rows], ())


def test_long_cells_are_shortened_before_a_column_is_dropped() -> None:
    lines, dropped = fitted(50, ["Stop", "99.1%", "6.3M", IMAGE])
    assert (lines[1][:3], dropped) == (["Stop", "99.1%", "6.3M"], ())
    start, end = lines[1][3].split("…")
    assert IMAGE.startswith(start)
    assert IMAGE.endswith(end)
    assert len(lines[1][3]) == 50 - len("label" + "99.1%" + "6.3M") - 3 * GAP


def test_columns_are_dropped_in_their_order_where_cells_would_be_too_short() -> None:
    assert fitted(2 * SHORT + 5 + 2 * GAP, [LABEL, "99.1%", "6.3M", IMAGE])[1] == ("MACs",)
    lines, dropped = fitted(2 * SHORT + 5, [LABEL, "99.1%", "6.3M", IMAGE])
    assert dropped == ("MACs", "score")
    assert [len(cell) for cell in lines[1]] == [21, 22]


@pytest.mark.parametrize("text", ["abcdefghij.png", "日本語の長い名前.png"])
def test_both_ends_of_a_shortened_text_are_kept(text: str) -> None:
    for width in range(1, 20):
        short = shorten_middle(text, width)
        assert cell_len(short) <= width
        start, found, end = short.partition("…")
        assert text.startswith(start)
        assert text.endswith(end)
        assert bool(found) == (cell_len(text) > width)
