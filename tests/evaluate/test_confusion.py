"""The confusion matrix counts every image once, also in its thinned form."""

from __future__ import annotations

import numpy as np

from mexit.evaluate.confusion import Confusion, confusion_matrix, confusions, thin


def test_rows_are_true_classes_and_the_last_column_has_no_answer() -> None:
    matrix = confusion_matrix(np.array([0, 0, 1, 2, 2]), np.array([0, 2, 1, -1, 0]), 3)
    assert matrix.tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 1]]


def test_the_most_frequent_errors_come_first_and_a_larger_share_decides_ties() -> None:
    matrix = np.array([[90, 4, 0, 0], [2, 10, 3, 9], [3, 0, 3, 0]])
    expected = [
        Confusion(0, 1, 4, 4 / 94),
        Confusion(2, 0, 3, 0.5),
        Confusion(1, 2, 3, 0.125),
        Confusion(1, 0, 2, 2 / 24),
    ]
    assert confusions(matrix) == expected
    assert confusions(matrix, 2) == expected[:2]
    assert confusions(np.array([[3, 0, 0], [0, 2, 0]])) == []


def test_a_small_matrix_is_drawn_whole() -> None:
    thinned = thin(np.array([[3, 1, 0], [0, 5, 2]]))
    assert thinned.complete
    assert thinned.cells.tolist() == [[3, 1, 0], [0, 5, 2]]
    assert list(thinned.rest) == ["no answer"]


def test_a_thinned_matrix_keeps_the_classes_with_the_most_errors_and_every_image_of_theirs() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 30, 900)
    predicted = labels.copy()
    predicted[labels == 7] = 8
    predicted[(labels == 20) & (np.arange(900) % 2 == 0)] = 3
    predicted[np.flatnonzero(labels == 8)[:2]] = 11
    matrix = confusion_matrix(labels, predicted, 30)
    thinned = thin(matrix, 4)
    assert thinned.classes.tolist() == [3, 7, 8, 20]
    assert not thinned.complete
    np.testing.assert_array_equal(thinned.cells.sum(axis=1), matrix.sum(axis=1)[thinned.classes])
    assert thinned.rest["other classes"].tolist() == [0, 0, 2, 0]


def test_shades_lie_between_0_and_1_and_show_shares() -> None:
    shades = thin(np.array([[50, 50, 0, 0], [1, 99, 0, 0], [0, 0, 7, 0]])).shades
    assert shades[0, 0] == 0.5
    assert shades[0, 1] == 1
    assert shades[1, 0] == np.sqrt(0.02)
    assert shades[0, 2] == 0
    rare = thin(np.array([[98, 2, 0], [0, 10, 0]])).shades
    assert rare[0, 1] == np.sqrt(0.1), "errors of 2 % are not drawn as strongly as errors of 50 %"
