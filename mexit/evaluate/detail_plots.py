"""The pictures of the details of an evaluation: confusion matrix, accuracy per class, reliability; with matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.evaluate.class_accuracy import ClassAccuracy
from mexit.evaluate.confusion import Thinned
from mexit.evaluate.fonts import class_label, drawable, font_files
from mexit.evaluate.names import abbreviate
from mexit.evaluate.plots import ATTACKED, CLEAN, Axes, new_figure, save

ERROR = ATTACKED  # wrong answers have the red of the other pictures, correct ones their blue
BEFORE = "#8a8f98"
_LARGE_CELLS = 20  # matrices up to this size have larger cells
_WHITE = 0.88  # cells darker than this have white numbers
_NAME = 24  # characters of a class name beside an axis
_PLAIN = {"parse_math": False}  # a class name may hold dollar signs


def confusion(thinned: Thinned, classes: Sequence[str], path: Path, title: str) -> None:
    """Draw a confusion matrix as shares of each true class: correct answers blue, errors red.

    Args:
        thinned: the classes to draw.
        classes: all class names, (C,).
        path, title: the PNG to write, and its title.
    """
    rows = len(thinned.classes)
    labels = [abbreviate(class_label(number, classes[number]), _NAME) for number in thinned.classes.tolist()]
    cell, size = (0.46, 9) if rows <= _LARGE_CELLS else (0.3, 8)
    side = max(2.4, cell * rows) + 0.085 * max(map(len, labels)) + 1
    with _any_script():
        figure, (axes,) = new_figure(1, size=(side + 0.8, side))
        _draw_matrix(axes, thinned.shades)
        _draw_counts(axes, thinned, size - 1.5)
        axes.set_xticks(range(rows + len(thinned.rest)), [*labels, *thinned.rest], rotation=90, fontsize=size, **_PLAIN)
        axes.set_yticks(range(rows), labels, fontsize=size, **_PLAIN)
        note = "" if thinned.complete else f"\nthe {rows} of {thinned.of} classes with the most errors"
        axes.set(xlabel="answer", ylabel="true class")
        axes.set_title(drawable(title) + note, fontsize=11, **_PLAIN)
        save(figure, path)


def class_accuracy(rows: Sequence[ClassAccuracy], overall: float, path: Path, title: str, most: int = 40) -> None:
    """Draw accuracy and interval of each class, the worst on top.

    Args:
        rows: one per class; those without images are left out.
        overall: accuracy of all images, in [0, 1], drawn as a vertical line.
        path, title: the PNG to write, and its title.
        most: largest number of classes to draw, the worst ones.
    """
    measured = [row for row in rows if row.value is not None]
    shown = sorted(measured, key=lambda row: (row.value, row.high))[:most][::-1]
    labels = [abbreviate(class_label(row.number, row.name), _NAME) for row in shown]
    with _any_script():
        figure, (axes,) = new_figure(1, size=(7.5, 1.5 + 0.25 * max(4, len(shown))))
        values = 100 * np.array([[row.low, row.value, row.high] for row in shown], float).reshape(-1, 3)
        positions, left = np.arange(len(shown)), values[:, 0].min(initial=100) // 10 * 10
        axes.hlines(positions, values[:, 0], values[:, 2], color=CLEAN, alpha=0.45, linewidth=3)
        axes.plot(values[:, 1], positions, "o", color=CLEAN, markersize=5)
        axes.axvline(100 * overall, color="grey", linewidth=0.8, linestyle="--")
        axes.text(100 * overall, 1.005, "all", transform=axes.get_xaxis_transform(), fontsize=8, ha="center",
                  color="grey")  # fmt: skip
        axes.set_yticks(positions, labels, fontsize=9, **_PLAIN)
        axes.set(xlabel="accuracy with 95 % interval, %", ylim=(-0.7, len(shown) - 0.3), xlim=(left - 2, 102))
        note = "" if len(shown) == len(measured) else f"\nthe {len(shown)} worst of {len(measured)} classes"
        axes.set_title(drawable(title) + note, fontsize=11, pad=14, **_PLAIN)
        save(figure, path)


def reliability(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw accuracy against confidence of each exit before and after temperature scaling.

    Args:
        rows: of `calibrate.temperature.reliability`.
        path, title: the PNG to write, and its title.
    """
    columns = min(4, len(rows))
    height = -(-len(rows) // columns)
    with _any_script():
        figure, panels = new_figure(len(rows), rows=height, size=(3.7 * columns + 0.6, 3.9 * height + 0.5))
        for axes, row in zip(panels, rows, strict=True):
            _draw_exit(axes, row)
        panels[0].legend(fontsize=8, loc="upper left", frameon=False)
        figure.suptitle(drawable(title), fontsize=11, **_PLAIN)
        save(figure, path)


def _draw_matrix(axes: Axes, shades: NDArray[np.float64]) -> None:
    """Colour the cells: the diagonal blue, errors red."""
    from matplotlib.colors import LinearSegmentedColormap

    blue = LinearSegmentedColormap.from_list("correct", ["#ffffff", CLEAN])
    red = LinearSegmentedColormap.from_list("error", ["#ffffff", ERROR])
    rows = np.arange(len(shades))
    colours = red(shades)
    colours[rows, rows] = blue(np.diagonal(shades))
    axes.imshow((255 * colours[..., :3]).astype(np.uint8), aspect="equal", interpolation="nearest")
    axes.grid(visible=False)
    right, bottom = shades.shape[1] - 0.5, len(shades) - 0.5
    axes.hlines(rows + 0.5, -0.5, right, color="#e3e6ea", linewidth=0.5)
    axes.vlines(np.arange(shades.shape[1]) + 0.5, -0.5, bottom, color="#e3e6ea", linewidth=0.5)
    axes.set(xlim=(-0.5, right), ylim=(bottom, -0.5))
    axes.tick_params(length=0)


def _draw_counts(axes: Axes, thinned: Thinned, size: float) -> None:
    counts, shades = thinned.cells, thinned.shades
    for row, column in np.argwhere(counts > 0).tolist():
        colour = "white" if shades[row, column] > _WHITE else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=size)


def _draw_exit(axes: Axes, row: Mapping[str, Any]) -> None:
    """The area of a point grows with the number of its images."""
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    for key, colour, label, width in (("bins_before", BEFORE, "before", 1.2), ("bins", CLEAN, "after", 1.8)):
        confidence, accuracy, n = (
            np.array([bin_[name] for bin_ in row[key]]) for name in ("confidence", "accuracy", "n")
        )
        axes.plot(confidence, accuracy, color=colour, linewidth=width, label=label)
        axes.scatter(confidence, accuracy, s=8 + 130 * n / n.sum(), color=colour, zorder=3, clip_on=False)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.set_title(f"exit {row['exit']}: ECE {row['ece_before']:.3f} to {row['ece']:.3f}", fontsize=10)


@contextmanager
def _any_script() -> Iterator[None]:
    """Within this context matplotlib draws text in the fonts of `fonts`."""
    import matplotlib

    with matplotlib.rc_context({"font.family": [*_families(), "sans-serif"]}):
        yield


@cache
def _families() -> tuple[str, ...]:
    """Names of the font families, made known to matplotlib."""
    from matplotlib import font_manager

    for path in font_files():
        font_manager.fontManager.addfont(str(path))
    names = (font_manager.FontProperties(fname=str(path)).get_name() for path in font_files())
    return tuple(dict.fromkeys(names))
