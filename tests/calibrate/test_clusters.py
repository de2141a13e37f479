"""Standard errors of grouped means against closed forms, simulation and published quantiles of Student's t."""

from __future__ import annotations

from math import inf, sqrt

import numpy as np
import pytest

from mexit.calibrate.clusters import Estimate, difference_interval, mean_with_error, t_quantile
from mexit.errors import BadInput, UsageError


@pytest.mark.parametrize(
    ("probability", "dof", "expected"),
    [
        (0.975, 1, 12.706204736174698),
        (0.975, 10, 2.2281388519649385),
        (0.95, 5, 2.015048373333),
        (0.995, 30, 2.749995653567231),
        (0.975, 2.5, 3.5746548420037),
        (0.025, 10, -2.2281388519649385),
        (0.5, 7, 0.0),
    ],
)
def test_quantiles_of_t(probability, dof, expected) -> None:
    assert t_quantile(probability, dof) == pytest.approx(expected, abs=1e-6)


def test_t_with_many_degrees_of_freedom_is_normal() -> None:
    assert t_quantile(0.975, 1e9) == pytest.approx(1.959963984540054, abs=1e-6)


def test_ungrouped_values_have_the_usual_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=50)
    estimate = mean_with_error(values)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.stderr == pytest.approx(values.std(ddof=1) / sqrt(50))
    assert (estimate.groups, estimate.dof) == (50, 49)
    assert mean_with_error(values, np.arange(50)) == estimate


def test_groups_of_equal_values_count_once() -> None:
    """Copies of a value in a group add no information."""
    values = np.random.default_rng(0).normal(size=50)
    copied, groups = np.repeat(values, 7), np.repeat(np.arange(50), 7)
    assert mean_with_error(copied, groups).stderr == pytest.approx(mean_with_error(values).stderr)
    assert mean_with_error(copied).stderr < mean_with_error(values).stderr / 2


def test_the_ratio_estimator_by_hand() -> None:
    """Groups (2, 4) and (6): mean 4, residuals -2 and 2, variance 2 / 1 * 8 / 9."""
    estimate = mean_with_error(np.array([2.0, 4.0, 6.0]), np.array([8, 8, 3]))
    assert estimate.value == 4
    assert estimate.stderr == pytest.approx(sqrt(2 * 8) / 3)
    assert (estimate.groups, estimate.dof) == (2, 1)


def test_intervals_of_grouped_proportions_cover_the_truth() -> None:
    """Groups of 1 to 12 pictures, mostly all right or all wrong, and larger groups are worse."""
    rng = np.random.default_rng(1)
    sizes = np.array([1, 4, 12])
    rates = np.array([0.98, 0.95, 0.8])
    truth = float((sizes * rates).sum() / sizes.sum())
    grouped = naive = 0
    for _ in range(400):
        kind = rng.integers(0, 3, 100)
        right = np.repeat(rng.random(100) < rates[kind], sizes[kind]).astype(float)
        groups = np.repeat(np.arange(100), sizes[kind])
        low, high = mean_with_error(right, groups).interval()
        grouped += low <= truth <= high
        low, high = mean_with_error(right).interval()
        naive += low <= truth <= high
    assert grouped >= 0.92 * 400
    assert naive < 0.85 * 400


def test_no_error_at_all_is_not_certainty() -> None:
    estimate = mean_with_error(np.ones(100))
    assert estimate.value == 1
    assert estimate.stderr == pytest.approx(0.01, rel=0.01)
    assert mean_with_error(np.full(100, 2.5)).stderr == 0, "costs may be constant"


def test_the_difference_of_two_means_by_welch_and_satterthwaite() -> None:
    a, b = Estimate(0.9, 0.02, 30, 29), Estimate(0.95, 0.01, 300, 299)
    dof = (4e-4 + 1e-4) ** 2 / (16e-8 / 29 + 1e-8 / 299)
    half = t_quantile(0.975, dof) * sqrt(5e-4)
    assert difference_interval(a, b) == pytest.approx((-0.05 - half, -0.05 + half))
    low, high = difference_interval(a, b, 0.5)
    assert -0.05 - half < low < -0.05 < high < -0.05 + half


def test_constant_values_have_an_empty_interval_and_one_group_an_infinite_one() -> None:
    constant = Estimate(3.0, 0.0, 10, 9)
    assert difference_interval(constant, constant) == (0.0, 0.0)
    single = mean_with_error(np.array([1.0, 0.0]), np.array([4, 4]))
    assert (single.stderr, single.groups) == (inf, 1)
    assert difference_interval(single, constant) == (-inf, inf)


@pytest.mark.parametrize(
    ("values", "groups"),
    [(np.zeros(0), None), (np.array([np.nan]), None), (np.zeros((2, 2)), None), (np.zeros(3), np.zeros(2, np.int64))],
    ids=["empty", "nan", "two axes", "two ids for three"],
)
def test_invalid_values_are_refused(values, groups) -> None:
    with pytest.raises(BadInput):
        mean_with_error(values, groups)


def test_invalid_probabilities_are_refused() -> None:
    estimate = Estimate(0.0, 1.0, 5, 4)
    for confidence in (0.0, 1.0):
        with pytest.raises(UsageError):
            difference_interval(estimate, estimate, confidence)
        with pytest.raises(UsageError):
            estimate.interval(confidence)
    with pytest.raises(UsageError):
        t_quantile(0.9, 0)
