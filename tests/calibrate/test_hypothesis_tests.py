"""p-values against closed forms and simulation."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from mexit.calibrate.hypothesis_tests import (
    betting,
    binomial_tail,
    certified_prefix,
    groups_needed,
    p_value,
    samples_needed,
    upper_mean,
    upper_rate,
)
from mexit.errors import BadInput, UsageError


@pytest.mark.parametrize(
    ("n", "epsilon", "largest"), [(100, 0.05, 1), (1000, 0.01, 5), (1000, 0.05, 40), (5000, 0.02, 86)]
)
def test_the_largest_number_of_losses_that_is_certified_at_level_10_percent(n, epsilon, largest) -> None:
    """Published figures of the exact binomial test, as counts."""

    def p(losses: int) -> float:
        return p_value("binomial", np.concatenate([np.ones(losses), np.zeros(n - losses)]), epsilon)

    assert p(largest) <= 0.1 < p(largest + 1)


@pytest.mark.parametrize(("n", "k", "p"), [(10, 0, 0.3), (10, 4, 0.3), (25, 24, 0.9), (40, 7, 0.05)])
def test_binomial_tail_is_the_sum_of_its_terms(n, k, p) -> None:
    expected = sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))
    assert binomial_tail(n, k, p) == pytest.approx(expected, rel=1e-12)
    assert binomial_tail(n, n, p) == 1.0
    assert binomial_tail(n, -1, p) == 0.0


@pytest.mark.parametrize("method", ["binomial", "betting"])
def test_the_p_value_grows_with_the_losses(method) -> None:
    def p(losses: int) -> float:
        return p_value(method, np.concatenate([np.ones(losses), np.zeros(2000 - losses)]), 0.05)

    assert p(20) < 1e-4
    assert p(20) < p(60) < p(110)
    assert p(100) > 0.1
    assert p(200) > 0.5


@pytest.mark.parametrize("method", ["binomial", "betting"])
@pytest.mark.parametrize("epsilon", [0.02, 0.1])
def test_p_values_are_valid_at_the_boundary_of_the_hypothesis(method, epsilon) -> None:
    rng = np.random.default_rng(3)
    delta, draws = 0.1, 2000
    rejected = sum(p_value(method, (rng.random(500) < epsilon).astype(float), epsilon) <= delta for _ in range(draws))
    assert rejected / draws <= delta + 3 * np.sqrt(delta * (1 - delta) / draws)


def test_betting_is_sharper_for_losses_of_small_variance() -> None:
    """At the same mean, 0/1 losses have a larger variance."""
    rng = np.random.default_rng(0)
    calm = 0.09 + 0.02 * rng.random(400)
    zero_one = (np.arange(400) % 10 == 0).astype(float)
    assert betting(calm, 0.12) < betting(zero_one, 0.12) / 100


def test_hypotheses_after_the_first_failure_are_not_certified() -> None:
    assert certified_prefix([True, True, False, True]) == 2
    assert certified_prefix([False, True]) == 0
    assert certified_prefix([True, True]) == 2


def test_upper_bounds_of_rates() -> None:
    assert upper_rate(0, 100, 0.05) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert binomial_tail(200, 7, upper_rate(7, 200, 0.1)) == pytest.approx(0.1)
    assert upper_rate(5, 5, 0.1) == 1
    assert upper_rate(0, 0, 0.1) == 1


def test_sample_sizes() -> None:
    assert samples_needed(0.02, 0.1, 0.0) == 114  # ln 0.1 / ln 0.98
    assert samples_needed(0.02, 0.1, 0.02) is None
    assert samples_needed(0.02001, 0.05, 0.02) is None  # hundreds of millions, which must not be counted out
    needed = samples_needed(0.02, 0.05, 0.01)
    assert needed is not None
    assert binomial_tail(needed, round(needed * 0.01), 0.02) <= 0.05


@pytest.mark.parametrize(
    ("losses", "epsilon", "error"),
    [
        (np.array([0.5, 0.2]), 0.1, UsageError),
        (np.array([]), 0.1, BadInput),
        (np.array([2.0]), 0.1, BadInput),
        (np.array([np.nan]), 0.1, BadInput),
        (np.array([0.0]), 0.0, UsageError),
    ],
    ids=["not 0/1", "empty", "above 1", "nan", "epsilon 0"],
)
def test_invalid_losses_are_refused(losses, epsilon, error) -> None:
    with pytest.raises(error):
        p_value("binomial", losses, epsilon)


def test_grouped_p_values_count_groups_not_samples() -> None:
    groups = np.repeat(np.arange(98), 8)
    losses = np.zeros(len(groups))
    assert p_value("binomial", losses, 0.02) < 1e-6
    assert p_value("betting", losses, 0.02, groups) > 0.1
    larger = np.repeat(np.arange(149), 8)
    assert p_value("betting", np.zeros(len(larger)), 0.02, larger) <= 0.05
    assert p_value("betting", np.zeros(len(larger) - 8), 0.02, larger[8:]) > 0.05


def test_groups_of_one_sample_change_nothing() -> None:
    losses = (np.arange(300) % 50 == 0).astype(float)
    for method in ("binomial", "betting"):
        assert p_value(method, losses, 0.05, np.arange(300)) == p_value(method, losses, 0.05)


@pytest.mark.parametrize("epsilon", [0.05, 0.2])
def test_grouped_p_values_are_valid_at_the_boundary_of_the_hypothesis(epsilon) -> None:
    """Groups are wrong as a whole, and large groups are wrong more often; the picture-wise test is then invalid."""
    rng = np.random.default_rng(3)
    sizes, delta, draws = np.array([1, 3, 8]), 0.1, 1000
    rates = np.array([0.2, 0.5, 1.2])
    rates *= epsilon / ((sizes * rates).sum() / sizes.sum())
    grouped = naive = 0
    for _ in range(draws):
        kind = rng.integers(0, 3, 120)
        losses = np.repeat((rng.random(120) < rates[kind]).astype(float), sizes[kind])
        groups = np.repeat(np.arange(120), sizes[kind])
        grouped += p_value("betting", losses, epsilon, groups) <= delta
        naive += p_value("binomial", losses, epsilon) <= delta
    assert grouped / draws <= delta
    assert naive / draws > 1.5 * delta


def test_another_number_of_group_ids_is_refused() -> None:
    with pytest.raises(BadInput, match="3 samples need 3 group ids"):
        p_value("betting", np.zeros(3), 0.1, np.zeros(2, np.int64))


def test_the_number_of_groups_that_would_be_enough() -> None:
    groups = np.repeat(np.arange(98), 8)
    losses = np.zeros(len(groups))
    assert groups_needed(losses, 0.02, 0.05, groups) == 149
    losses[groups == 0] = 1
    needed = groups_needed(losses, 0.02, 0.05, groups)
    assert needed is not None
    assert needed > 300
    many = np.repeat(np.arange(98 * (needed // 98 + 1)), 8)
    assert p_value("betting", np.resize(losses, len(many)), 0.02, many) <= 0.1
    assert groups_needed(losses, 0.01, 0.05, groups) is None
    unequal = np.repeat(np.arange(100), np.resize([1, 9], 100))
    assert groups_needed(np.zeros(500), 0.02, 0.05, unequal) > 149, "small groups say less"


def test_upper_bounds_of_grouped_means() -> None:
    groups = np.repeat(np.arange(100), 5)
    losses = (groups % 20 == 0).astype(float)
    bound = upper_mean(losses, 0.05, groups)
    assert upper_mean(losses, 0.05) == upper_rate(25, 500, 0.05) < bound < 0.16
    assert p_value("betting", losses, bound, groups) == pytest.approx(0.05, abs=1e-3)
    assert upper_mean(np.ones(500), 0.05, groups) == 1
    assert upper_mean(losses, 0.01, groups) > bound


def test_grouped_bounds_cover_the_mean() -> None:
    rng = np.random.default_rng(0)
    groups, covered = np.repeat(np.arange(60), 4), 0
    for _ in range(100):
        losses = np.repeat((rng.random(60) < 0.1).astype(float), 4)
        covered += upper_mean(losses, 0.1, groups) >= 0.1
    assert covered >= 85
