"""Scores: larger is surer, no ties among sure images, NaN never sure, the same whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mexit.core.exit_policy import should_exit
from mexit.core.scores import MEASURES, Scorer, State
from mexit.errors import BadInput, UsageError

EXITS, CLASSES = 3, 5
TEMPERATURES = (1.0, 0.5, 2.5)
each_measure = pytest.mark.parametrize("measure", MEASURES)
alone_or_together = pytest.mark.parametrize("ensemble", [False, True], ids=["each exit alone", "ensemble"])


def scorer(measure: str = "max-probability", ensemble: bool = False) -> Scorer:
    return Scorer(measure, ensemble, TEMPERATURES, CLASSES)


def logits(seed: int = 0, n: int = 64, scale: float = 5.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (EXITS, n, CLASSES)).astype(np.float32)


def plain_softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def plain_probabilities(values: np.ndarray, ensemble: bool) -> np.ndarray:
    """The definition: tempered softmax, and for the ensemble its mean over the exits so far. (E, N, C)."""
    alone = plain_softmax(values.astype(np.float64) / np.asarray(TEMPERATURES)[:, None, None])
    return np.cumsum(alone, axis=0) / np.arange(1, EXITS + 1)[:, None, None] if ensemble else alone


def plain_score(measure: str, p: np.ndarray) -> np.ndarray:
    """Scores of probabilities (N, C) by their textbook formulas; agreement is tested on its own."""
    descending = np.sort(p, axis=1)[:, ::-1]
    if measure == "max-probability":
        return np.log(descending[:, 0] / descending[:, 1:].sum(axis=1))
    if measure == "margin":
        return np.log(descending[:, 0] / descending[:, 1])
    return (p * np.log(p)).sum(axis=1)


def folded(values: np.ndarray, judge: Scorer, rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Scores (E, N) and probabilities (E, N, C), the rows answered in the given batches."""
    scores = np.zeros(values.shape[:2])
    probabilities = np.zeros(values.shape)
    for batch in rows:
        state = judge.start(len(batch))
        for k in range(1, EXITS + 1):
            state, probabilities[k - 1, batch], scores[k - 1, batch] = judge.step(k, values[k - 1, batch], state)
    return scores, probabilities


@alone_or_together
def test_probabilities_are_the_mean_of_tempered_softmax(ensemble: bool) -> None:
    values = logits()
    _, found = folded(values, scorer(ensemble=ensemble), [np.arange(64)])
    np.testing.assert_allclose(found, plain_probabilities(values, ensemble), rtol=1e-12)


@pytest.mark.parametrize("measure", MEASURES[:3])
@alone_or_together
def test_scores_are_their_textbook_formulas(measure: str, ensemble: bool) -> None:
    values = logits()
    found = scorer(measure, ensemble).score(values)
    for k, p in enumerate(plain_probabilities(values, ensemble)):
        expected = plain_score(measure, p)
        np.testing.assert_allclose(found[k], expected, rtol=1e-9, atol=1e-15, err_msg=f"exit {k + 1}")


@alone_or_together
def test_agreement_counts_exits_in_a_row_that_name_the_same_class(ensemble: bool) -> None:
    values = logits(scale=1.0)
    named = plain_probabilities(values, ensemble).argmax(axis=2)
    found = scorer("agreement", ensemble).score(values)
    for row in range(values.shape[1]):
        in_a_row = 0
        for k in range(EXITS):
            in_a_row = in_a_row + 1 if k and named[k, row] == named[k - 1, row] else 1
            assert in_a_row < found[k, row] < in_a_row + 1


@each_measure
def test_larger_means_surer(measure: str) -> None:
    rising = np.zeros((EXITS, 200, CLASSES), np.float32)
    rising[:, :, 2] = np.linspace(0.01, 60, 200)
    assert (np.diff(scorer(measure).score(rising), axis=1) > 0).all()


@each_measure
def test_no_ties_where_the_float32_softmax_is_exactly_one(measure: str) -> None:
    sure = np.zeros((EXITS, 50, CLASSES), np.float32)
    sure[:, :, 0] = np.linspace(20, 300, 50)
    one = np.float32(1) / (np.float32(1) + 4 * np.exp(-sure[0, 0, 0], dtype=np.float32))
    assert one == 1.0
    for row in scorer(measure).score(sure):
        assert len(np.unique(row)) == 50


@each_measure
@alone_or_together
@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["nan", "infinity"])
def test_one_bad_number_makes_a_row_never_sure_and_no_other(measure: str, ensemble: bool, bad: float) -> None:
    values = logits(n=4)
    values[:, 1, 3] = bad
    found = scorer(measure, ensemble).score(values)
    assert np.isnan(found[:, 1]).all()
    assert np.isfinite(found[:, [0, 2, 3]]).all()
    assert not should_exit(found[0], -1e300)[1]
    assert should_exit(found[0], -1e300)[[0, 2, 3]].all()


@each_measure
@alone_or_together
def test_minus_infinity_is_a_class_without_probability(measure: str, ensemble: bool) -> None:
    values = logits(n=4)
    values[:, :, 4] = -np.inf
    assert np.isfinite(scorer(measure, ensemble).score(values)).all()


@each_measure
@alone_or_together
def test_scores_do_not_depend_on_the_batch_to_the_last_bit(measure: str, ensemble: bool) -> None:
    values, judge = logits(scale=30.0), scorer(measure, ensemble)
    expected = folded(values, judge, [np.arange(64)])
    order = np.random.default_rng(1).permutation(64)
    for batches in ([np.asarray([row]) for row in range(64)], np.array_split(order, [1, 3, 10, 40])):
        scores, probabilities = folded(values, judge, list(batches))
        assert scores.tobytes() == expected[0].tobytes()
        assert probabilities.tobytes() == expected[1].tobytes()


@each_measure
@alone_or_together
def test_rows_taken_and_merged_half_way_go_on_as_before(measure: str, ensemble: bool) -> None:
    values, judge = logits(n=12, scale=1.0), scorer(measure, ensemble)
    expected = judge.score(values)
    halves = []
    for rows in (slice(0, 6), slice(6, 12)):
        state, _, _ = judge.step(1, values[0, rows], judge.start(6))
        halves.append(judge.step(2, values[1, rows], state)[0])
    order = np.asarray([11, 0, 7, 3, 8, 2, 5])
    _, _, score = judge.step(3, values[2, order], State.concat(halves).take(order))
    assert score.tobytes() == expected[2, order].tobytes()


@each_measure
@alone_or_together
@settings(max_examples=60, deadline=None)
@given(arrays.arrays(np.float32, (EXITS, 3, CLASSES), elements=st.floats(width=32)))
def test_any_float32_logits_give_a_number_or_nan_and_no_warning(
    measure: str, ensemble: bool, values: np.ndarray
) -> None:
    with np.errstate(all="ignore"):
        found = scorer(measure, ensemble).score(values)
    broken = np.isnan(values).any(axis=2) | (values == np.inf).any(axis=2) | (values == -np.inf).all(axis=2)
    seen = np.logical_or.accumulate(broken, axis=0) if ensemble else broken
    assert (np.isnan(found) == seen).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_scores_are_float64_whatever_the_engine_gives(dtype: type) -> None:
    _, probabilities, score = scorer().step(1, np.ones((2, CLASSES), dtype), scorer().start(2))
    assert score.dtype == probabilities.dtype == np.float64


def test_no_rows_are_no_error() -> None:
    _, probabilities, score = scorer().step(1, np.zeros((0, CLASSES), np.float32), scorer().start(0))
    assert (probabilities.shape, score.shape) == ((0, CLASSES), (0,))


def test_logits_of_another_shape_say_found_and_expected() -> None:
    with pytest.raises(BadInput, match=r"exit 2 gave logits of shape \(2, 4\), expected \(B, 5\)"):
        scorer().step(2, np.zeros((2, 4), np.float32), scorer().start(2))
    with pytest.raises(BadInput, match=r"expected logits \(3, N, C\), found shape \(2, 7, 5\)"):
        scorer().score(np.zeros((2, 7, 5), np.float32))


@pytest.mark.parametrize(
    ("measure", "temperatures", "classes", "words"),
    [
        ("guess", (1.0,), 5, "unknown confidence measure 'guess': choose from max-probability, margin"),
        ("margin", (1.0,), 1, "at least 2 classes, found 1"),
        ("margin", (0.0,), 5, "positive and finite"),
        ("margin", (float("nan"),), 5, "positive and finite"),
        ("margin", (float("inf"),), 5, "positive and finite"),
    ],
    ids=["unknown measure", "one class", "temperature 0", "temperature nan", "temperature infinite"],
)
def test_a_scorer_that_cannot_be_is_refused(
    measure: str, temperatures: tuple[float, ...], classes: int, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        Scorer(measure, False, temperatures, classes)
