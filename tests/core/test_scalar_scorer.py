"""`ScalarScorer` decides and answers as `Scorer.step` does, to the last bit, for any logits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mexit.core.exit_policy import Policy, should_exit
from mexit.core.scores import MAX_SCALAR_CLASSES, MEASURES, ScalarScorer, Scorer
from mexit.errors import BadInput

EXITS = 4
each_measure = pytest.mark.parametrize("measure", MEASURES)
own_or_ensemble = pytest.mark.parametrize("ensemble", [False, True], ids=["own", "ensemble"])

TEMPERATURES = st.lists(st.sampled_from([1.0, 0.05, 1.7, 30.0, 1e10, 1e-300, 1e300]), min_size=EXITS, max_size=EXITS)
CLASS_COUNTS = st.sampled_from([2, 3, 10, 17])
ORDINARY = st.floats(-30, 30, width=32)
ANY = st.one_of(ORDINARY, st.floats(width=32), st.sampled_from([0.0, 1.0, np.nan, np.inf, -np.inf, 3e38, -3e38]))


@st.composite
def rows(draw: st.DrawFn) -> np.ndarray:
    """Logits (E, C) of one row: ordinary, or with some extreme, equal, infinite or NaN values."""
    classes = draw(CLASS_COUNTS)
    numbers = draw(st.sampled_from([ORDINARY, ANY, st.sampled_from([0.0, 1.0, 2.0])]))
    values = draw(st.lists(numbers, min_size=EXITS * classes, max_size=EXITS * classes))
    bad = draw(st.sampled_from([None, None, np.nan, np.inf, -np.inf]))  # a single one
    if bad is not None:
        values[draw(st.integers(0, len(values) - 1))] = bad
    return np.asarray(values, np.float32).reshape(EXITS, classes)


def step_through(policy: Policy, logits: np.ndarray) -> tuple[list[float], list[bool], list[np.ndarray]]:
    """Scores, decisions (E-1) and probabilities of every exit by `Scorer.step` and `should_exit`."""
    scorer = policy.scorer(logits.shape[1])
    state, scores, leaves, probabilities = scorer.start(1), [], [], []
    for k in range(1, EXITS + 1):
        state, exit_probabilities, score = scorer.step(k, logits[k - 1 : k], state)
        scores.append(float(score[0]))
        leaves += [bool(should_exit(score, policy.threshold(k))[0])] if k < EXITS else []
        probabilities.append(exit_probabilities[0])
    return scores, leaves, probabilities


def check(policy: Policy, logits: np.ndarray) -> None:
    scores, leaves, probabilities = step_through(policy, logits)
    for decides in (lambda _: True, lambda k: k % 2 == 0, lambda _: False):  # a caller may not ask at every exit
        row = ScalarScorer(policy.scorer(logits.shape[1]))
        for k in range(1, EXITS + 1):
            row.add(logits[k - 1 : k])
            if k < EXITS and decides(k):
                assert row.reaches(policy.threshold(k)) == leaves[k - 1], f"exit {k}"
            if decides(k):
                assert row.reaches(0.25) == (scores[k - 1] >= 0.25), f"exit {k}, another threshold"
            assert row.probabilities().tobytes() == probabilities[k - 1].tobytes(), f"exit {k}"


@each_measure
@own_or_ensemble
@settings(max_examples=150, deadline=None)
@given(rows(), TEMPERATURES, st.lists(st.one_of(st.none(), st.floats(-50, 50)), min_size=3, max_size=3), st.data())
def test_decisions_and_probabilities_equal_those_of_step(
    measure, ensemble, logits, temperatures, thresholds, data
) -> None:
    with np.errstate(all="ignore"):
        policy = Policy(measure, ensemble, tuple(temperatures), tuple(thresholds))
        check(policy, logits)
        scores = step_through(policy, logits)[0][:-1]
        near = [_near(score, data) if np.isfinite(score) else None for score in scores]
        check(Policy(measure, ensemble, tuple(temperatures), tuple(near)), logits)


def _near(score: float, data: st.DataObject) -> float:
    """The score, a neighbouring float, or a number within the error of an estimate."""
    move = data.draw(st.sampled_from([0.0, np.inf, -np.inf, 1e-15, -1e-15, 1e-12, -1e-12, 1e-7, -1e-7]))
    near = np.nextafter(score, move) if np.isinf(move) else score + move * max(1.0, abs(score))
    return float(near) if np.isfinite(near) else score


@each_measure
@own_or_ensemble
def test_ordinary_rows_are_decided_by_the_estimate(measure, ensemble) -> None:
    logits = np.random.default_rng(0).normal(0, 5, (50, EXITS, 10)).astype(np.float32)
    policy = Policy(measure, ensemble, (1.0, 1.5, 0.7, 1.0), (0.5, -0.5, 2.5))
    expected = [step_through(policy, row)[1] for row in logits]
    for row_logits, leaves in zip(logits, expected, strict=True):
        row = ScalarScorer(policy.scorer(10))
        for k in range(1, EXITS):
            row.add(row_logits[k - 1 : k])
            assert row.reaches(policy.threshold(k)) == leaves[k - 1]
        assert not row.exact


def test_agreement_leaves_a_near_tie_to_step() -> None:
    logits = np.zeros((EXITS, 10), np.float32)
    logits[0, :2] = (1, 1.000001)  # equal log-probabilities at a temperature of 1e10: the first class is predicted
    logits[1:, 1] = 9
    policy = Policy("agreement", False, (1e10, 1.0, 1.0, 1.0), (None, 2.2, 3.2))
    assert step_through(policy, logits)[1] == [False, False, False]
    check(policy, logits)


@pytest.mark.parametrize("measure", ["max-probability", "margin"])
@own_or_ensemble
@pytest.mark.parametrize("gap", [640.3, 700.7, 720.9, 743.1, 760.0])
def test_probabilities_too_small_for_a_float_are_left_to_step(measure, ensemble, gap) -> None:
    logits = np.zeros((EXITS, 4), np.float32)
    logits[:, 2] = gap
    never = Policy(measure, ensemble, (1.0,) * EXITS, (None,) * (EXITS - 1))
    for move in (-1e-3, 1e-3):
        near = tuple(score + move for score in step_through(never, logits)[0][:-1])
        check(Policy(measure, ensemble, (1.0,) * EXITS, near), logits)


@each_measure
@own_or_ensemble
def test_many_classes_are_left_to_step(measure, ensemble) -> None:
    logits = np.random.default_rng(0).normal(0, 5, (EXITS, MAX_SCALAR_CLASSES + 1)).astype(np.float32)
    check(Policy(measure, ensemble, (1.0,) * EXITS, (0.5, -0.5, 2.5)), logits)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_float_dtype(dtype) -> None:
    logits = np.random.default_rng(0).normal(0, 5, (EXITS, 10)).astype(dtype)
    check(Policy("margin", True, (1.0,) * EXITS, (0.5, 1.5, 2.5)), logits)


def test_logits_of_another_shape_say_found_and_expected() -> None:
    row = ScalarScorer(Scorer("margin", False, (1.0, 1.0), 5))
    with pytest.raises(BadInput, match=r"exit 1 gave logits of shape \(1, 4\), expected \(1, 5\)"):
        row.add(np.zeros((1, 4), np.float32))
