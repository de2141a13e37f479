"""Accuracy of each class, with confidence intervals that count groups where images have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mexit.calibrate.clusters import mean_with_error
from mexit.evaluate.answers import Answers
from mexit.evaluate.confusion import Counts
from mexit.evaluate.results import Correct

CONFIDENCE = 0.95


@dataclass(frozen=True)
class ClassAccuracy:
    """The accuracy of one class.

    Attributes:
        number, name: of the class.
        n: number of test images.
        groups: number of groups of test images; None without groups.
        value, low, high: share of correct answers and its interval, in [0, 1]; None without images.
        columns: share of correct answers of each exit or budget, by its name; empty without images.
        answered: the most frequent wrong answer: class number and number of images; None without errors.
    """

    number: int
    name: str
    n: int
    groups: int | None
    value: float | None
    low: float | None
    high: float | None
    columns: Mapping[str, float]
    answered: tuple[int, int] | None


def class_accuracies(
    answers: Answers, names: Sequence[str], columns: Mapping[str, Correct], matrix: Counts
) -> list[ClassAccuracy]:
    """The accuracy of each class, in the order of the classes.

    Args:
        answers: to N images.
        names: class names, (C,).
        columns: further policies or exits: name to whether each answer is correct, (N,).
        matrix: of `confusion_matrix`, (C, C + 1).
    """
    order = np.argsort(answers.labels, kind="stable")
    bounds = np.searchsorted(answers.labels[order], np.arange(len(names) + 1))
    rows = []
    for number, name in enumerate(names):
        members = order[bounds[number] : bounds[number + 1]]
        groups = None if answers.groups is None else answers.groups[members]
        count = None if groups is None else len(np.unique(groups))
        wrong = matrix[number, :-1].copy()
        wrong[number] = 0
        answered = (int(wrong.argmax()), int(wrong.max())) if wrong.any() else None
        value = low = high = None
        if len(members):
            correct = answers.correct[members]
            value, (low, high) = float(correct.mean()), share_interval(correct, groups)
        shares = {column: float(correct[members].mean()) for column, correct in columns.items() if len(members)}
        rows.append(ClassAccuracy(number, name, len(members), count, value, low, high, shares, answered))
    return rows


def share_interval(hits: Correct, groups: NDArray[np.int64] | None = None) -> tuple[float, float]:
    """The interval of a share at `CONFIDENCE`, of `calibrate.clusters.mean_with_error`.

    Args:
        hits: (n,), n > 0.
        groups: group of each sample, (n,); None = each sample is a group.

    Returns:
        The ends of the interval, in [0, 1]; 0 and 1 for a single group.
    """
    low, high = mean_with_error(hits.astype(np.float64), groups).interval(CONFIDENCE)
    return max(0.0, low), min(1.0, high)
