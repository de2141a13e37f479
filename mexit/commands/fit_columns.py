"""Columns of text that fit the width of a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

GAP = 2  # spaces between columns
SHORT = 20  # width to which long cells may be shortened before a column is dropped


def fit(
    lines: Sequence[Sequence[str]], width: int, *, drop: Sequence[str] = (), shorten: Sequence[str] = ()
) -> tuple[list[list[str]], tuple[str, ...]]:
    """Drop columns and shorten cells until a line fits.

    Args:
        lines: the headers, all different, then the cells of each row.
        width: of the terminal, in characters.
        drop: headers of the columns that may be dropped, the first one first.
        shorten: headers of the columns whose cells may be shortened, in the middle.

    Returns:
        The lines, and the headers of the dropped columns. Lines remain longer than `width` if nothing else may go.
    """
    columns = {header: [header, *cells] for header, *cells in zip(*lines, strict=True)}
    dropped = []
    for header in drop:
        if _total({name: min(size, SHORT) if name in shorten else size for name, size in _sizes(columns)}) <= width:
            break
        dropped.append(header)
        del columns[header]
    sizes = dict(_sizes(columns))
    flexible = sorted((header for header in shorten if header in columns), key=lambda header: sizes[header])
    room = width - _total(sizes) + sum(sizes[header] for header in flexible)
    for left, header in zip(range(len(flexible), 0, -1), flexible, strict=True):
        size = max(min(sizes[header], room // left), cell_len(header))
        columns[header] = [shorten_middle(cell, size) for cell in columns[header]]
        room -= size
    return [list(cells) for cells in zip(*columns.values(), strict=True)], tuple(dropped)


def shorten_middle(text: str, width: int) -> str:
    """A text of at most `width` characters on the screen, with its beginning and its end."""
    if cell_len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{set_cell_size(text, width - 1 - end).rstrip()}…{set_cell_size(text[::-1], end).rstrip()[::-1]}"


def _sizes(columns: dict[str, list[str]]) -> list[tuple[str, int]]:
    return [(header, max(map(cell_len, cells))) for header, cells in columns.items()]


def _total(sizes: dict[str, int]) -> int:
    return sum(sizes.values()) + GAP * (len(sizes) - 1)
