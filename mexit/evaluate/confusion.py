"""The confusion matrix, its most frequent errors, and a thinned form of it for many classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWN_CLASSES = 50
STRONGEST_ERROR = 0.2  # share of a class whose errors are drawn in full colour, if no share is larger

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Confusion:
    """Images of one class that were answered with another.

    Attributes:
        true, predicted: class numbers.
        n: number of images.
        share: of all images of the true class, in [0, 1].
    """

    true: int
    predicted: int
    n: int
    share: float


@dataclass(frozen=True)
class Thinned:
    """The part of a confusion matrix that is drawn.

    Attributes:
        classes: class numbers of its rows and columns, in order, (S,).
        counts: row = true class, column = answer, (S, S).
        rest: further columns by name, (S,) each: answers with another class, and no answer, where there are some.
        of: number of classes of the whole matrix, C.
    """

    classes: Counts
    counts: Counts
    rest: Mapping[str, Counts]
    of: int

    @property
    def cells(self) -> Counts:
        """The counts and the further columns, (S, S + R)."""
        return np.column_stack([self.counts, *self.rest.values()])

    @property
    def shades(self) -> NDArray[np.float64]:
        """How dark each cell is drawn, in [0, 1], (S, S + R).

        On the diagonal the share of the true class; elsewhere the root of the share relative to the largest one, so
        that rare errors are visible.
        """
        shares = self.cells / np.maximum(1, self.cells.sum(axis=1, keepdims=True))
        correct = np.diagonal(shares).copy()
        np.fill_diagonal(shares, 0)
        shades = np.sqrt(shares / max(float(shares.max(initial=0)), STRONGEST_ERROR))
        np.fill_diagonal(shades, correct)
        return np.asarray(shades)

    @property
    def complete(self) -> bool:
        """Whether every class is drawn."""
        return len(self.classes) == self.of


def confusion_matrix(labels: Counts, predicted: Counts, classes: int) -> Counts:
    """Count the answers to each class.

    Args:
        labels: true classes, (N,).
        predicted: answers, (N,); -1 = none.
        classes: number of classes, C.

    Returns:
        Row = true class, column = answer; the last column counts images without an answer, (C, C + 1).
    """
    columns = np.where(predicted < 0, classes, predicted)
    flat = np.bincount(labels * (classes + 1) + columns, minlength=classes * (classes + 1))
    return flat.reshape(classes, classes + 1)


def confusions(matrix: Counts, most: int | None = None) -> list[Confusion]:
    """The errors of a matrix (C, C + 1), the most frequent first; images without an answer do not count."""
    errors = matrix[:, :-1].copy()
    np.fill_diagonal(errors, 0)
    true, predicted = np.nonzero(errors)
    counts, totals = errors[true, predicted], matrix.sum(axis=1)[true]
    order = np.lexsort((predicted, true, -counts / totals, -counts))[:most]
    return [
        Confusion(int(true[i]), int(predicted[i]), int(counts[i]), float(counts[i] / totals[i])) for i in order.tolist()
    ]


def thin(matrix: Counts, most: int = DRAWN_CLASSES) -> Thinned:
    """The rows and columns of at most `most` classes: those with the most errors, as true class or as answer."""
    classes = len(matrix)
    square = matrix[:, :classes]
    errors = square.sum(axis=1) + square.sum(axis=0) - 2 * np.diagonal(square)
    shown = np.sort(np.argsort(-errors, kind="stable")[:most])
    counts = square[np.ix_(shown, shown)]
    rest = {"other classes": square[shown].sum(axis=1) - counts.sum(axis=1), "no answer": matrix[shown, classes]}
    return Thinned(shown, counts, {name: column for name, column in rest.items() if column.any()}, classes)
