"""THE decision, against a loop that anybody can read."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mexit.core.exit_policy import LOWEST, Policy, first_exit, should_exit
from mexit.errors import UsageError

SCORES = st.one_of(st.sampled_from([0.0, -0.0, 1.0, math.nan, math.inf, -math.inf]), st.floats(-3, 3))
THRESHOLDS = st.one_of(st.none(), st.sampled_from([0.0, 1.0, -1e300]), st.floats(-3, 3))


def plain_first_exit(scores: list[list[float]], thresholds: list[float | None]) -> list[int]:
    exits = []
    for row in range(len(scores[0])):
        taken = len(thresholds) + 1
        for k, threshold in enumerate(thresholds):
            if threshold is not None and scores[k][row] >= threshold:
                taken = k + 1
                break
        exits.append(taken)
    return exits


@st.composite
def questions(draw: st.DrawFn) -> tuple[list[list[float]], list[float | None]]:
    exits, rows = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    row = st.lists(SCORES, min_size=rows, max_size=rows)
    scores = draw(st.lists(row, min_size=exits, max_size=exits))
    return scores, draw(st.lists(THRESHOLDS, min_size=exits - 1, max_size=exits - 1))


@settings(max_examples=300, deadline=None)
@given(questions())
def test_the_first_exit_is_the_one_that_a_plain_loop_finds(
    question: tuple[list[list[float]], list[float | None]],
) -> None:
    scores, thresholds = question
    assert first_exit(np.asarray(scores), thresholds).tolist() == plain_first_exit(scores, thresholds)


@settings(max_examples=100, deadline=None)
@given(questions())
def test_the_scores_of_the_last_exit_decide_nothing(
    question: tuple[list[list[float]], list[float | None]],
) -> None:
    scores, thresholds = question
    if thresholds:
        without_last = first_exit(np.asarray(scores[:-1]), thresholds)
        assert without_last.tolist() == first_exit(np.asarray(scores), thresholds).tolist()


@settings(max_examples=100, deadline=None)
@given(questions(), st.floats(0, 2))
def test_a_lower_threshold_lets_nobody_leave_later(
    question: tuple[list[list[float]], list[float | None]], step: float
) -> None:
    scores, thresholds = question
    lower = [None if value is None else value - step for value in thresholds]
    assert (first_exit(np.asarray(scores), lower) <= first_exit(np.asarray(scores), thresholds)).all()


def test_reaching_the_threshold_is_enough_and_nan_reaches_none() -> None:
    assert should_exit(np.asarray([1.0, 0.999, math.nan, math.inf]), 1.0).tolist() == [True, False, False, True]
    assert not should_exit(np.asarray([1.0, math.inf, math.nan]), None).any()


def test_each_row_against_a_threshold_of_its_own() -> None:
    """Where the threshold is None, which is NaN among others, nobody leaves, however sure."""
    score = np.asarray([1.0, 0.5, math.inf, math.nan, 2.0])
    thresholds = (1.0, 1.0, None, -1e300, None)
    own = np.asarray([math.nan if one is None else one for one in thresholds])
    each = [should_exit(score[row : row + 1], threshold)[0] for row, threshold in enumerate(thresholds)]
    assert should_exit(score, own).tolist() == each == [True, False, False, False, False]


def test_nan_walks_to_the_last_exit() -> None:
    assert first_exit(np.full((3, 2), math.nan), (-1e300, -1e300)).tolist() == [3, 3]


def test_no_samples_no_exits() -> None:
    assert first_exit(np.zeros((3, 0)), (0.0, 0.0)).tolist() == []


def test_never_leave_keeps_the_scores_and_drops_the_thresholds() -> None:
    policy = Policy("margin", True, (1.0, 2.0, 3.0), (0.5, None))
    full = policy.without_early_exit()
    assert full == Policy("margin", True, (1.0, 2.0, 3.0), (None, None))
    assert (policy.threshold(1), policy.threshold(2)) == (0.5, None)


@pytest.mark.parametrize(
    ("thresholds", "words"),
    [
        ((0.1,), "3 exits need 2 thresholds, found 1"),
        ((0.1, 0.2, 0.3), "3 exits need 2 thresholds, found 3"),
        ((0.1, math.nan), "finite or None"),
        ((math.inf, 0.1), "finite or None"),
    ],
    ids=["too few", "too many", "nan", "infinite"],
)
def test_thresholds_that_cannot_be_are_refused(thresholds: tuple[float, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Policy("margin", False, (1.0, 1.0, 1.0), thresholds)


@pytest.mark.parametrize(("score", "confident", "unsure"), [
    (0.9, False, True), (1.0, False, False), (0.9, True, False), (math.nan, False, True), (-math.inf, True, False),
])  # fmt: skip
def test_an_answer_below_the_reject_threshold_is_unsure_unless_it_was_confident(score, confident, unsure) -> None:
    policy = Policy("margin", False, (1.0, 1.0), (2.0,), (1.0, None))
    assert policy.unsure(np.array([1]), np.array([score]), np.array([confident])).tolist() == [unsure]
    assert policy.unsure(np.array([2]), np.array([-1e300]), np.array([False])).tolist() == [False]


def test_a_policy_without_reject_thresholds_is_never_unsure() -> None:
    policy = Policy("margin", False, (1.0, 1.0), (2.0,))
    assert policy.unsure(np.array([1, 2]), np.array([-5.0, -5.0]), np.array([False, False])) is None


@pytest.mark.parametrize("reject", [(1.0,), (1.0, 2.0, 3.0), (math.nan, 1.0), (1.0, math.inf)])
def test_reject_thresholds_are_one_finite_number_per_exit(reject) -> None:
    with pytest.raises(UsageError, match=r"reject thresholds|must be finite"):
        Policy("margin", False, (1.0, 1.0), (2.0,), reject)


def test_the_policy_of_full_keeps_its_reject_thresholds_and_that_of_a_latency_profile_does_not() -> None:
    policy = Policy("margin", False, (1.0, 1.0), (2.0,), (1.0, 0.5))
    assert policy.without_early_exit().reject == (1.0, 0.5)
    assert policy.evaluate_all_heads().reject is None


def test_reaching_a_threshold_that_every_score_reaches_is_no_confidence() -> None:
    policy = Policy("margin", False, (1.0, 1.0, 1.0), (2.0, LOWEST), (3.0, 1.0, 1.0))
    assert policy.selective == (True, False, False)
    exits, scores, confident = np.array([1, 2, 2]), np.array([2.5, 0.5, 1.5]), np.array([True, True, True])
    assert policy.unsure(exits, scores, confident).tolist() == [False, True, False]
