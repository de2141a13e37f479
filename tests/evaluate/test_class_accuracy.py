"""Accuracy per class; its intervals count groups."""

from __future__ import annotations

import numpy as np
import pytest

from mexit.calibrate.clusters import mean_with_error
from mexit.evaluate.answers import Answers
from mexit.evaluate.class_accuracy import class_accuracies, share_interval
from mexit.evaluate.confusion import confusion_matrix


def test_every_class_has_its_images_its_errors_and_the_other_policies() -> None:
    labels, predicted = np.array([0, 0, 0, 2, 2]), np.array([0, 2, 2, 2, 0])
    answers = Answers("x", np.arange(5), labels, predicted, np.ones(5), np.ones(5, np.int64))
    columns = {"full": np.array([True, True, False, True, True])}
    first, second, third = class_accuracies(answers, ["a", "b", "c"], columns, confusion_matrix(labels, predicted, 3))
    assert (first.n, first.value, first.answered) == (3, pytest.approx(1 / 3), (2, 2))
    assert first.columns == {"full": pytest.approx(2 / 3)}
    assert (second.n, second.value, second.low, second.answered, second.columns) == (0, None, None, None, {})
    assert (third.n, third.value, third.groups) == (2, 0.5, None)


def test_groups_are_counted_in_each_class() -> None:
    labels = np.array([0, 0, 0, 1, 1])
    groups = np.array([5, 5, 9, 9, 9])
    answers = Answers("x", np.arange(5), labels, labels, np.ones(5), np.ones(5, np.int64), groups)
    rows = class_accuracies(answers, ["a", "b"], {}, confusion_matrix(labels, labels, 2))
    assert [row.groups for row in rows] == [2, 1]
    assert (rows[1].low, rows[1].high) == (0, 1), "one group tells nothing about others"


def test_an_interval_is_wider_with_fewer_groups_and_stays_within_0_and_1() -> None:
    hits = np.arange(40) % 8 != 0
    alone, pairs = (share_interval(hits, groups) for groups in (None, np.arange(40) // 2))
    blocks = np.arange(40) < 35
    independent, grouped = share_interval(blocks), share_interval(blocks, np.arange(40) // 5)
    assert grouped[1] - grouped[0] > independent[1] - independent[0]
    low, high = share_interval(np.ones(12, bool))
    assert 0 < low < 0.95
    assert high == 1
    assert alone == pytest.approx(mean_with_error(hits.astype(float)).interval())
    assert pairs[0] < hits.mean() < pairs[1]
