"""Geometric thresholds against a plain-loop implementation of the published protocol, and edge cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mexit.calibrate.geometric import ALWAYS, Ranking, admit_highest, exit_shares, geometric
from mexit.core.exit_policy import first_exit


def plain_protocol(confidence: np.ndarray, q: float) -> tuple[list[float], np.ndarray]:
    """MSDNet's budgeted protocol of paper and code, sample by sample.

    Returns the confidence of the last sample admitted at each exit (1e8 if none), and the exits taken.
    """
    exits, samples = confidence.shape
    probability = np.array([q**k for k in range(1, exits + 1)])
    probability /= probability.sum()
    taken = np.full(samples, exits)
    left = np.zeros(samples, bool)
    thresholds = []
    for k in range(exits - 1):
        quota = int(np.floor(samples * probability[k] + 1e-9))
        threshold, count = 1e8, 0
        for row in sorted(range(samples), key=lambda row: -confidence[k, row]):
            if left[row]:
                continue
            if count == quota:
                break
            count += 1
            threshold = confidence[k, row]
        if count < quota or not quota:
            threshold = 1e8
        thresholds.append(threshold)
        for row in range(samples):
            if not left[row] and confidence[k, row] >= threshold:
                left[row], taken[row] = True, k + 1
    return thresholds, taken


@pytest.mark.parametrize("q", [p / 20 for p in range(1, 40)])
def test_same_exits_as_the_published_protocol(q) -> None:
    rng = np.random.default_rng(7)
    scores = np.sort(rng.normal(size=(4, 400)), axis=0)
    scores[2] = np.round(scores[2], 1)  # ties
    published, exits = plain_protocol(scores, q)
    thresholds = geometric(Ranking.of(scores), q)
    np.testing.assert_array_equal(first_exit(scores, thresholds), exits)
    for threshold, last_admitted in zip(thresholds, published, strict=True):
        if threshold is None:
            assert last_admitted == 1e8
        else:
            assert threshold == ALWAYS or threshold < last_admitted


def test_threshold_is_the_midpoint_to_the_next_score_and_ties_leave_together() -> None:
    assert admit_highest(np.array([5.0, 4.0, 4.0, 1.0]), 2) == 2.5
    assert admit_highest(np.array([5.0, 4.0, 1.0]), 1) == 4.5


def test_quotas_of_no_sample_and_of_all_samples_and_nan() -> None:
    falling = np.array([3.0, 1.0, np.nan])
    assert admit_highest(falling, 0) is None
    assert admit_highest(falling, 2) == ALWAYS
    assert admit_highest(falling, 3) == ALWAYS
    assert admit_highest(np.array([np.nan, np.nan]), 1) == ALWAYS
    exits = first_exit(np.array([[3.0, np.nan, 1.0]] * 2), (admit_highest(falling, 3),))
    assert exits.tolist() == [1, 2, 1]  # NaN reaches no threshold, not even `ALWAYS`


def test_shares_range_from_all_at_the_first_to_all_at_the_last_exit() -> None:
    np.testing.assert_allclose(exit_shares(2.0, 3), np.array([2, 4, 8]) / 14)
    assert exit_shares(0, 3).tolist() == [1, 0, 0]
    assert exit_shares(np.inf, 3).tolist() == [0, 0, 1]
    assert geometric(Ranking.of(np.ones((3, 5))), np.inf) == (None, None)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 5))
def test_thresholds_do_not_depend_on_the_order_of_samples(seed, q) -> None:
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=(3, 60)), 1)
    assert geometric(Ranking.of(scores), q) == geometric(Ranking.of(scores[:, rng.permutation(60)]), q)
