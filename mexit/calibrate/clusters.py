"""Means of grouped samples with their standard errors, and intervals of the difference of two means.

Pictures of one object or film are alike, so their errors are correlated. Each mean is the ratio estimator of cluster
sampling (W. Cochran, Sampling Techniques, 1977, section 9A): the sum of the values over the number of samples. Its
variance comes from the sums of residuals per group, with the correction G / (G - 1) and Student's t with G - 1 degrees
of freedom for G groups (A. Cameron, D. Miller, A Practitioner's Guide to Cluster-Robust Inference, 2015). Two means
have the degrees of freedom of Welch and Satterthwaite.

A variance that is estimated from few errors is too small: without any error it is 0. Where all values are 0 or 1, the
variance therefore includes one more group of zeros and one of ones (A. Agresti, B. Caffo, The American Statistician,
2000); the mean does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import exp, inf, lgamma, log, sqrt

import numpy as np
from numpy.typing import NDArray

from mexit.core.scores import Floats
from mexit.errors import BadInput, UsageError

_TINY = 1e-300


@dataclass(frozen=True)
class Estimate:
    """A mean and its error.

    Attributes:
        value: the mean over samples.
        stderr: its standard error; infinite with a single group.
        groups: number of groups; of samples, where each is its own group.
        dof: degrees of freedom of the standard error.
    """

    value: float
    stderr: float
    groups: int
    dof: float

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Two-sided confidence interval of the mean. Raises `UsageError` unless `confidence` is in (0, 1)."""
        half = _half_width(self.stderr, self.dof, confidence)
        return self.value - half, self.value + half


def mean_with_error(values: Floats, groups: NDArray[np.int64] | None = None) -> Estimate:
    """The mean of grouped values.

    Args:
        values: (N,), such as correct (0 or 1) or the cost in MACs of each sample.
        groups: group id of each sample, (N,); None = each sample is its own group.

    Raises:
        BadInput: no values, values that are not finite, or another number of group ids.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise BadInput(f"a mean needs finite values (N,) with N > 0, found {values.dtype} {values.shape}")
    sums, sizes = group_sums(values, groups)
    count, mean = len(sums), float(values.mean())
    if count < 2:
        return Estimate(mean, inf, count, 1.0)
    residuals = sums - mean * sizes
    total = float((residuals**2).sum())
    if np.isin(values, (0.0, 1.0)).all():
        total += float(sizes.mean()) ** 2 * (mean**2 + (1 - mean) ** 2)
    return Estimate(mean, sqrt(count / (count - 1) * total) / len(values), count, float(count - 1))


def group_sums(values: Floats, groups: NDArray[np.int64] | None) -> tuple[Floats, Floats]:
    """The sum of the values and the number of samples of each group, (G,) each; `groups` None = one sample each.

    Raises:
        BadInput: `groups` and `values` differ in length.
    """
    if groups is None:
        return values, np.ones(len(values))
    if groups.shape != values.shape:
        raise BadInput(f"{len(values)} samples need {len(values)} group ids, found {groups.shape}")
    _, member = np.unique(groups, return_inverse=True)
    return np.bincount(member, values).astype(np.float64), np.bincount(member).astype(np.float64)


def difference_interval(a: Estimate, b: Estimate, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided confidence interval of the mean of `a` minus the mean of `b`, measured on different groups.

    Args:
        a, b: independent estimates.
        confidence: in (0, 1).

    Raises:
        UsageError: `confidence` is out of range.
    """
    difference = a.value - b.value
    squares = a.stderr**2, b.stderr**2
    if inf in squares:
        dof = 1.0
    elif not sum(squares):
        dof = a.dof + b.dof
    else:
        dof = sum(squares) ** 2 / (squares[0] ** 2 / a.dof + squares[1] ** 2 / b.dof)
    half = _half_width(sqrt(sum(squares)), dof, confidence)
    return difference - half, difference + half


@lru_cache  # the classes of a data set have few different numbers of groups
def t_quantile(probability: float, dof: float) -> float:
    """The quantile of Student's t distribution, for any positive number of degrees of freedom.

    Args:
        probability: in (0, 1).
        dof: degrees of freedom, above 0.

    Raises:
        UsageError: an argument is out of range.
    """
    if not 0 < probability < 1 or not dof > 0:
        raise UsageError(f"a quantile of t needs a probability in (0, 1) and dof above 0, found {probability}, {dof}")
    tail = 2 * min(probability, 1 - probability)
    low, high = -700.0, 700.0  # log of the quantile: bisection on a logarithmic scale also finds those of a small dof
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _two_sided_tail(exp(middle), dof) > tail else (low, middle)
    quantile = exp((low + high) / 2) if tail < 1 else 0.0
    return quantile if probability >= 0.5 else -quantile


def _two_sided_tail(t: float, dof: float) -> float:
    """P(|T| > t) = I_x(dof / 2, 1 / 2) with x = dof / (dof + t^2)."""
    ratio = t / sqrt(dof)
    x = 1 / (1 + ratio * ratio)
    return _incomplete_beta(x, 1 - x if ratio > 1e-8 else ratio * ratio, dof / 2, 0.5)


def _incomplete_beta(x: float, complement: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b); `complement` is 1 - x."""
    if x <= 0 or complement <= 0:
        return 0.0 if x <= 0 else 1.0
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log(complement))
    if x < (a + 1) / (a + b + 2):
        return front * _beta_fraction(x, a, b) / a
    return 1 - front * _beta_fraction(complement, b, a) / b


def _beta_fraction(x: float, a: float, b: float) -> float:
    """The continued fraction of the incomplete beta function (NIST DLMF 8.17.22), by Lentz's method."""
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 10_000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away_from_zero(1 + term * d)
            c = _away_from_zero(1 + term / c)
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return fraction


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


def _half_width(stderr: float, dof: float, confidence: float) -> float:
    if not 0 < confidence < 1:
        raise UsageError(f"a confidence must lie between 0 and 1, found {confidence}")
    return t_quantile((1 + confidence) / 2, dof) * stderr if stderr else 0.0
