"""p-values for "the risk is above epsilon", and what to do with a path of them.

A policy is certified by rejecting that hypothesis on data that chose nothing. Losses are 0/1, or bounded and
scaled to [0, 1].

    binomial              exact tail, 0/1 losses            P(Bin(n, eps) <= k)
    hoeffding-bentkus     losses in [0, 1]                  Bates et al., J. ACM 2021
    betting               losses in [0, 1], variance-aware  Waudby-Smith, Ramdas, JRSS B 2024
    conformal             mean guarantee only, no p-value   Angelopoulos et al., ICLR 2024

Along a path from safe to bold, hypotheses are tested in that order, each at the full level, until the first that
is not rejected (fixed-sequence testing; Angelopoulos et al., Learn then Test, 2021). What was rejected is
certified, all of it at once. The first failing point is not among them, and no point behind it ever is.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, exp, lgamma, log

import numpy as np
from numpy.typing import NDArray

from mexit.core.scores import Floats
from mexit.errors import BadInput, UsageError

METHODS = ("binomial", "hoeffding-bentkus", "betting", "conformal")
_SHUFFLE_SEED = 0


def p_value(method: str, losses: Floats, epsilon: float) -> float:
    """The p-value of "mean loss > epsilon".

    Args:
        method: one of `METHODS` but `conformal`.
        losses: (n,) in [0, 1]; 0 or 1 for `binomial`.
        epsilon: in (0, 1).
    """
    _check(losses, epsilon)
    if method == "binomial":
        if not np.isin(losses, (0.0, 1.0)).all():
            raise UsageError("the binomial tail needs losses of 0 or 1: choose hoeffding-bentkus or betting")
        return binomial_tail(len(losses), round(float(losses.sum())), epsilon)
    if method == "hoeffding-bentkus":
        return hoeffding_bentkus(float(losses.mean()), len(losses), epsilon)
    if method == "betting":
        return betting(losses, epsilon)
    raise UsageError(f"unknown method '{method}': choose from {', '.join(METHODS)}")


def binomial_tail(n: int, k: int, probability: float) -> float:
    """P(Bin(n, probability) <= k), summed in logarithms."""
    if k >= n:
        return 1.0
    if k < 0:
        return 0.0
    counts = np.arange(k + 1)
    log_choose = lgamma(n + 1) - _log_factorial(counts) - _log_factorial(n - counts)
    logs = log_choose + counts * log(probability) + (n - counts) * np.log1p(-probability)
    top = logs.max()
    return min(1.0, exp(top) * float(np.exp(logs - top).sum()))


def hoeffding_bentkus(mean: float, n: int, epsilon: float) -> float:
    """The smaller of Hoeffding's and Bentkus' bound for a mean of losses in [0, 1]."""
    low = min(mean, epsilon)
    divergence = _relative(low, epsilon) + _relative(1 - low, 1 - epsilon)
    # 1e-9: a mean of k/n times n may exceed k by a rounding error, and the ceiling would then add one.
    bentkus = exp(1) * binomial_tail(n, ceil(n * mean - 1e-9), epsilon)
    return min(1.0, exp(-n * divergence), bentkus)


def betting(losses: Floats, epsilon: float) -> float:
    """1 / the largest wealth of a gambler who bets that losses stay below epsilon.

    Wealth prod (1 - nu_i (x_i - epsilon)) with predictable stakes nu_i is a supermartingale if the
    mean is above epsilon; by Ville's inequality it exceeds 1/p with probability at most p. Stakes follow the
    running mean and variance, and never risk more than everything.
    """
    losses = np.random.default_rng(_SHUFFLE_SEED).permutation(losses)
    n = len(losses)
    places = np.arange(1, n + 1)
    means = (0.5 + np.cumsum(losses)) / (places + 1)
    variances = (0.25 + np.cumsum((losses - means) ** 2)) / (places + 1)
    before = np.concatenate([[0.25], variances[:-1]])
    # The stake that is best for a level of 5 %; any predictable stake is valid.
    stakes = np.minimum(np.sqrt(2 * log(20) / (n * before)), 1 / (1 - epsilon) * (1 - 1e-9))
    wealth = np.cumsum(np.log1p(-stakes * (losses - epsilon)))
    return float(min(1.0, exp(-wealth.max())))


def conformal_allows(losses: Floats, epsilon: float) -> bool:
    """Conformal risk control: n/(n+1) mean + 1/(n+1) <= epsilon. A guarantee for the mean over calibrations."""
    _check(losses, epsilon)
    n = len(losses)
    return bool(float(losses.sum()) + 1 <= epsilon * (n + 1) + 1e-12)


def certified_prefix(passes: Sequence[bool]) -> int:
    """How many hypotheses in a row, from the safe end, are rejected: what lies behind the first failure is not."""
    for count, passed in enumerate(passes):
        if not passed:
            return count
    return len(passes)


def allowed_losses(method: str, n: int, epsilon: float, delta: float) -> int:
    """The largest count of 0/1 losses among n that still certifies epsilon at level delta; -1 if none does."""
    low, high = -1, n
    while low < high:
        middle = (low + high + 1) // 2
        losses = np.concatenate([np.ones(middle), np.zeros(n - middle)])
        good = (
            conformal_allows(losses, epsilon)
            if method == "conformal"
            else p_value(method, losses, epsilon) <= delta
        )
        low, high = (middle, high) if good else (low, middle - 1)
    return low


def upper_rate(losses: int, n: int, delta: float) -> float:
    """An upper confidence bound for a rate of which `losses` of n were seen (Clopper-Pearson); 1 for n = 0."""
    low, high = losses / n if n else 1.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if middle < 1 and binomial_tail(n, losses, middle) > delta else (low, middle)
    return high


def samples_needed(epsilon: float, delta: float, rate: float) -> int | None:
    """How many samples the exact binomial tail needs to certify epsilon if the true rate is `rate`.

    None where no number will do, because the rate is not below epsilon.
    """
    if rate >= epsilon:
        return None
    n = 1
    while binomial_tail(n, round(n * rate), epsilon) > delta:
        n = n + 1 if n < 100 else int(n * 1.02)
    return n


def _relative(a: float, b: float) -> float:
    return 0.0 if a <= 0 else a * log(a / b)


def _log_factorial(counts: NDArray[np.int64]) -> Floats:
    return np.array([lgamma(count + 1) for count in counts.tolist()])


def _check(losses: Floats, epsilon: float) -> None:
    if not 0 < epsilon < 1:
        raise UsageError(f"a risk must lie between 0 and 1, found {epsilon}")
    if losses.ndim != 1 or not len(losses):
        raise BadInput(f"losses must be a list of numbers, found shape {losses.shape}")
    if not (np.isfinite(losses).all() and losses.min() >= 0 and losses.max() <= 1):
        raise BadInput("losses must lie in [0, 1]")
