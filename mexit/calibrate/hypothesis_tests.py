"""p-values for the hypothesis "the risk is above epsilon", and fixed-sequence testing.

A policy is certified by rejecting that hypothesis on data that was used for no selection.

    binomial   0/1 losses: the exact tail P(Bin(n, epsilon) <= k)
    betting    losses in [0, 1]: variance-adaptive (I. Waudby-Smith, A. Ramdas, JRSS B 2024)
    grouped    samples in groups (pictures of one object or film): the betting test on one number per group

A grouped test treats groups as independent, not samples. Let S be the sum of the losses of a group, m its number of
samples, and M the largest m. The risk of a sample is E[S] / E[m], so "risk > epsilon" means E[S - epsilon m] > 0. The
number epsilon + (S - epsilon m) / M lies in [0, 1] and has a mean above epsilon exactly then: the betting test rejects
"its mean > epsilon". This holds for every correlation inside groups, and where the size of a group depends on its
losses. M stands for the largest group of the population: the data must not have much larger groups than the sample.

For 0/1 losses the stake of a grouped bet is the one with which n whole groups of size M pass with the most errors: with
p the rate for which n KL(p, epsilon) = log(1 / level), it is (epsilon - p) / (epsilon (1 - epsilon)), and n counts a
group of size m as m / M groups, by the mean size of those before it. Without errors and with equal sizes, the smallest
n that passes is the binomial one, (1 - epsilon)^n <= level.

Hypotheses are tested in a fixed order, from the safest policy to the cheapest, each at the full level, up to the
first that is not rejected (A. Angelopoulos et al., Learn then Test, 2021). All rejected ones are certified jointly.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, lgamma, log

import numpy as np
from numpy.typing import NDArray

from mexit.calibrate.clusters import group_sums
from mexit.core.scores import Floats
from mexit.errors import BadInput, UsageError

METHODS = ("binomial", "betting")
MAX_SAMPLES = 100_000  # of `samples_needed`, whose time rises with the number
_SHUFFLE_SEED = 0


def p_value(
    method: str, losses: Floats, epsilon: float, groups: NDArray[np.int64] | None = None, level: float = 0.05
) -> float:
    """The p-value of "mean loss > epsilon".

    Args:
        method: one of `METHODS`.
        losses: (n,) in [0, 1]; 0 or 1 for `binomial`.
        epsilon: in (0, 1).
        groups: group id of each sample, (n,); where a group has several samples, the test is the grouped one, whatever
            the method. None = samples are independent.
        level: level in (0, 1) at which the grouped test is most likely to reject; the p-value is valid with any.

    Raises:
        UsageError: unknown method, epsilon out of range, or losses other than 0 and 1 for `binomial`.
        BadInput: no losses, losses outside [0, 1], or another number of group ids.
    """
    _check(losses, epsilon)
    if method in METHODS and are_grouped(groups):
        return _smallest_p(_log_wealth_of_groups(*_grouped(losses, epsilon, groups), epsilon, level))
    if method == "binomial":
        if not np.isin(losses, (0.0, 1.0)).all():
            raise UsageError("the binomial test needs losses of 0 or 1: choose betting")
        return binomial_tail(len(losses), round(float(losses.sum())), epsilon)
    if method == "betting":
        return betting(losses, epsilon)
    raise UsageError(f"unknown method '{method}': choose from {', '.join(METHODS)}")


def are_grouped(groups: NDArray[np.int64] | None) -> bool:
    """Whether some group has several samples."""
    return groups is not None and len(np.unique(groups)) < len(groups)


def binomial_tail(n: int, k: int, probability: float) -> float:
    """P(Bin(n, probability) <= k), summed in logarithms."""
    if k >= n:
        return 1.0
    if k < 0:
        return 0.0
    counts = np.arange(k + 1)
    log_choose = lgamma(n + 1) - _log_factorial(counts) - _log_factorial(n - counts)
    logs = log_choose + counts * log(probability) + (n - counts) * np.log1p(-probability)
    largest = logs.max()
    return min(1.0, exp(largest) * float(np.exp(logs - largest).sum()))


def betting(losses: Floats, epsilon: float) -> float:
    """p-value of the betting test: 1 / the largest wealth of a gambler who bets that losses stay below epsilon.

    The wealth prod (1 - nu_i (x_i - epsilon)) with predictable stakes nu_i is a supermartingale if the mean is above
    epsilon; by Ville's inequality it exceeds 1/p with probability at most p. The stakes follow the running mean and
    variance, and are capped so that the wealth stays positive.

    Args:
        losses: (n,) in [0, 1]; they are shuffled with a fixed seed.
        epsilon: in (0, 1).
    """
    return _smallest_p(_log_wealth(np.random.default_rng(_SHUFFLE_SEED).permutation(losses), epsilon))


def _smallest_p(log_wealth: Floats) -> float:
    return float(min(1.0, exp(-log_wealth.max())))


def _log_wealth(losses: Floats, epsilon: float) -> Floats:
    """Logarithm of the gambler's wealth after each loss, (n,)."""
    n = len(losses)
    numbers = np.arange(1, n + 1)
    means = (0.5 + np.cumsum(losses)) / (numbers + 1)
    variances = (0.25 + np.cumsum((losses - means) ** 2)) / (numbers + 1)
    previous = np.concatenate([[0.25], variances[:-1]])
    # The stake that is best at level 5 %; any predictable stake is valid.
    stakes = np.minimum(np.sqrt(2 * log(20) / (n * previous)), 1 / (1 - epsilon) * (1 - 1e-9))
    return np.asarray(np.cumsum(np.log1p(-stakes * (losses - epsilon))))


def certified_prefix(rejected: Sequence[bool]) -> int:
    """The number of hypotheses before the first that is not rejected."""
    return next((count for count, one in enumerate(rejected) if not one), len(rejected))


def upper_rate(losses: int, n: int, delta: float) -> float:
    """Upper confidence bound of a rate (Clopper-Pearson) at level `delta`, from `losses` of n; 1 for n = 0."""
    low, high = losses / n if n else 1.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if middle < 1 and binomial_tail(n, losses, middle) > delta else (low, middle)
    return high


def upper_mean(losses: Floats, delta: float, groups: NDArray[np.int64] | None = None) -> float:
    """Upper confidence bound of the mean of 0/1 losses at level `delta`: `upper_rate`, or with groups the grouped test.

    Args:
        losses: (n,), 0 or 1.
        delta: in (0, 1).
        groups: group id of each sample, (n,), or None.
    """
    if not are_grouped(groups):
        return upper_rate(round(float(losses.sum())), len(losses), delta)
    low, high = float(losses.mean()), 1.0
    for _ in range(30):
        middle = (low + high) / 2
        rejected = 0 < middle < 1 and p_value("betting", losses, middle, groups) <= delta
        low, high = (low, middle) if rejected else (middle, high)
    return high


def samples_needed(epsilon: float, delta: float, rate: float) -> int | None:
    """The number of samples that the binomial test needs to certify epsilon at level delta for a true rate.

    None if `MAX_SAMPLES` are not enough, because the rate is not far enough below epsilon.
    """
    n = 1
    while rate < epsilon and n <= MAX_SAMPLES:
        if binomial_tail(n, round(n * rate), epsilon) <= delta:
            return n
        n = n + 1 if n < 100 else int(n * 1.02)
    return None


def groups_needed(losses: Floats, epsilon: float, delta: float, groups: NDArray[np.int64]) -> int | None:
    """The number of groups like these that the grouped test needs to certify epsilon at level delta.

    None if `MAX_SAMPLES` are not enough, because the mean loss is not far enough below epsilon.

    Args:
        losses: (n,) in [0, 1].
        epsilon, delta: in (0, 1).
        groups: group id of each sample, (n,).
    """
    scaled, sizes, zero_one = _grouped(losses, epsilon, groups)
    if scaled.mean() >= epsilon:
        return None

    def is_enough(count: int) -> bool:  # by the wealth at the end: its largest value depends on the order of groups
        more = np.resize(scaled, count), np.resize(sizes, count), zero_one
        return bool(_log_wealth_of_groups(*more, epsilon, delta)[-1] >= -log(delta))

    high = 1
    while not is_enough(high):
        if high > MAX_SAMPLES:
            return None
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _grouped(losses: Floats, epsilon: float, groups: NDArray[np.int64] | None) -> tuple[Floats, Floats, bool]:
    """The groups in random order: the number to bet on (G,), the size as a share of M (G,), if losses are 0 or 1."""
    sums, sizes = group_sums(losses, groups)
    scaled = np.clip(epsilon + (sums - epsilon * sizes) / sizes.max(), 0, 1)
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(len(sizes))
    return scaled[order], sizes[order] / sizes.max(), bool(np.isin(losses, (0.0, 1.0)).all())


def _log_wealth_of_groups(scaled: Floats, sizes: Floats, zero_one: bool, epsilon: float, level: float) -> Floats:
    """Logarithm of the gambler's wealth after each group, (G,)."""
    if not zero_one:
        return _log_wealth(scaled, epsilon)
    n = len(scaled)
    mean_sizes = (1 + np.cumsum(sizes) - sizes) / np.arange(1, n + 1)  # of the groups before each, and one of size M
    stakes = _stakes(n * mean_sizes, epsilon, level)
    return np.asarray(np.cumsum(np.log1p(-stakes * (scaled - epsilon))))


def _stakes(counts: Floats, epsilon: float, level: float) -> Floats:
    """The stake for each number of independent 0/1 losses; see the head of this file."""
    low, high = np.zeros(len(counts)), np.full(len(counts), epsilon)
    for _ in range(40):
        rate = (low + high) / 2
        enough = counts * _divergence(rate, epsilon) >= -log(level)
        low, high = np.where(enough, rate, low), np.where(enough, high, rate)
    return (epsilon - low) / (epsilon * (1 - epsilon)) * (1 - 1e-9)


def _divergence(rate: Floats, epsilon: float) -> Floats:
    """Relative entropy of two rates of errors, in nats."""
    positive = np.maximum(rate, 1e-300)
    return np.asarray(positive * np.log(positive / epsilon) + (1 - rate) * np.log1p((epsilon - rate) / (1 - epsilon)))


def _log_factorial(counts: NDArray[np.int64]) -> Floats:
    return np.array([lgamma(count + 1) for count in counts.tolist()])


def check_share(option: str, value: float) -> None:
    """Raise `UsageError` unless the value of an option is a share, in (0, 1)."""
    if not 0 < value < 1:
        hint = f": write {value / 100:g} for {value:g}%" if 1 <= value < 100 else ""
        raise UsageError(f"{option} must lie between 0 and 1, found {value:g}{hint}")


def _check(losses: Floats, epsilon: float) -> None:
    if not 0 < epsilon < 1:
        raise UsageError(f"a risk must lie between 0 and 1, found {epsilon}")
    if losses.ndim != 1 or not len(losses):
        raise BadInput(f"losses must have shape (n,) with n > 0, found {losses.shape}")
    if not (np.isfinite(losses).all() and losses.min() >= 0 and losses.max() <= 1):
        raise BadInput("losses must lie in [0, 1]")
