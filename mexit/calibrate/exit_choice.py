"""Chooses the exits that an export keeps: the subset with the smallest mean time at the accuracy of the static network.

Every subset of at most `MAX_EARLY` early exits is judged in the same way. The cheapest thresholds that lose at most
`MAX_LOSS` accuracy against the static network are selected on one part of the data and judged on the other part, for
both orders of the parts. The time of an exit is the sum of the times of the merged segments up to it.

    allowed   subsets whose judged loss exceeds `MAX_LOSS` by at most one standard error
    best      the allowed subset with the smallest mean time
    chosen    the smallest subset that is slower than the best one by at most one standard error of the paired
              difference, or by `SAME` of the static network's time; without early exits unless it saves at least
              `MIN_SAVED` of the static network's time and twice the standard error

Thresholds are the exact ones of `threshold_search` on a grid of quantiles of the largest probability.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from mexit.calibrate.clusters import Estimate, mean_with_error
from mexit.calibrate.threshold_search import search_thresholds
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.cost import MICROSECONDS, Costs
from mexit.core.scores import Floats, Scorer
from mexit.core.trace import Trace
from mexit.errors import BadInput

MAX_EARLY = 3  # thresholds of up to three early exits are searched exactly
MAX_LOSS = 0.005
SAME = 0.01
MIN_SAVED = 0.03
MEASURABLE = 8  # exits for which the times of all merged segments are measured
MIN_SAMPLES = 50

Subset = tuple[int, ...]  # early exits, from 1, rising


@dataclass(frozen=True)
class SegmentTimes:
    """Times of merged segments on one device, batch 1.

    Attributes:
        us: microseconds from after exit i to exit j, decision included, by (i, j) with i = 0 for the image.
        static_us: microseconds of the static network.
    """

    us: Mapping[tuple[int, int], float]
    static_us: float

    def leaving(self, exits: Sequence[int]) -> tuple[float, ...]:
        """Microseconds of leaving at each of these exits (the last exit included), if no other exits exist."""
        return tuple(np.cumsum([self.us[pair] for pair in zip((0, *exits), exits, strict=False)]).tolist())

    @staticmethod
    def from_prefixes(prefix_us: Sequence[float], cut_us: float) -> SegmentTimes:
        """Estimates from the times of the network up to each exit, (E,), and of one more cut, microseconds."""
        last = len(prefix_us)
        us = {
            (i, j): prefix_us[j - 1] - (prefix_us[i - 1] - cut_us if i else 0.0)
            for j in range(1, last + 1)
            for i in range(j)
        }
        return SegmentTimes(us, prefix_us[-1])


@dataclass(frozen=True)
class SubsetResult:
    """A subset of early exits, judged on data that did not select its thresholds.

    Attributes:
        exits: the early exits, from 1.
        times_us: of each sample, (N,).
        losses: whether the static network is correct minus whether the answer is, of each sample, (N,).
        groups: group id of each sample, (N,), or None.
    """

    exits: Subset
    times_us: Floats
    losses: Floats
    groups: NDArray[np.int64] | None

    @cached_property
    def time(self) -> Estimate:
        """Mean time in microseconds."""
        return mean_with_error(self.times_us, self.groups)

    @cached_property
    def loss(self) -> Estimate:
        """Mean loss of accuracy."""
        return mean_with_error(self.losses, self.groups)


@dataclass(frozen=True)
class ExitChoice:
    """The exits to keep.

    Attributes:
        kept: numbers of the exits, the last one included.
        dropped: the reason for each other exit, by its number.
        mean_us: mean time with these exits at a loss of about `MAX_LOSS`; that of the static network without early
            exits.
        static_us: time of the static network.
        loss, loss_error: measured loss of accuracy and its standard error, fractions.
        n: number of samples.
    """

    kept: tuple[int, ...]
    dropped: Mapping[int, str]
    mean_us: float
    static_us: float
    loss: float
    loss_error: float
    n: int


class ExitSearch:
    """Judges subsets of the exits of one network. Results are cached."""

    def __init__(self, parts: Sequence[Trace], times: SegmentTimes) -> None:
        """Prepare the search.

        Args:
            parts: two traces of all exits, with labels, on different samples.
            times: of the merged segments.

        Raises:
            BadInput: not two parts, a part without labels or with fewer than `MIN_SAMPLES` samples.
        """
        sizes = [part.logits.shape[1] for part in parts]
        if len(parts) != 2 or min(sizes) < MIN_SAMPLES or any(part.labels is None for part in parts):
            raise BadInput(
                f"two parts with labels and at least {MIN_SAMPLES} samples are needed, found {sizes} samples"
            )
        self.parts, self.times, self.exits = parts, times, parts[0].logits.shape[0]
        self._results: dict[Subset, SubsetResult | None] = {}

    def result(self, early: Subset) -> SubsetResult | None:
        """The judged subset; None if no thresholds lose little enough."""
        if early not in self._results:
            self._results[early] = self._judge(early)
        return self._results[early]

    def allowed(self, subsets: Iterable[Subset]) -> list[SubsetResult]:
        """The judged subsets whose loss is small enough, by rising mean time."""
        results = (self.result(early) for early in subsets)
        fits = [one for one in results if one is not None and one.loss.value <= MAX_LOSS + one.loss.stderr]
        return sorted(fits, key=lambda one: (one.time.value, len(one.exits), one.exits))

    def _judge(self, early: Subset) -> SubsetResult | None:
        exits = (*early, self.exits)
        leaving = self.times.leaving(exits) if early else (self.times.static_us,)
        costs = Costs(leaving, self.times.static_us, MICROSECONDS)
        evaluators = [_evaluator(part, exits, costs) for part in self.parts]
        times_us, losses = [], []
        for selecting, judging in (evaluators, evaluators[::-1]):
            least = float(selecting.correct[-1].mean()) - MAX_LOSS
            found = [one for one in search_thresholds(selecting) if one.accuracy >= least] if early else []
            thresholds = found[0].thresholds if found else (None,) * len(early)
            times_us.append(judging.spent(thresholds))
            losses.append(judging.correct[-1].astype(np.float64) - judging.hits(thresholds))
        groups = None
        if all(part.groups is not None for part in self.parts):
            groups = np.concatenate([part.groups for part in self.parts[::-1] if part.groups is not None])
        return SubsetResult(early, np.concatenate(times_us), np.concatenate(losses), groups)


def shortlist(search: ExitSearch) -> tuple[int, ...]:
    """The exits, at most `MEASURABLE` with the last, whose merged segments are worth measuring; times are estimates."""
    early = range(1, search.exits)
    kept: list[int] = []
    for one in search.allowed(chain_subsets(early, 2)):
        kept += [k for k in one.exits if k not in kept][: MEASURABLE - 1 - len(kept)]
    kept += [k for k in early if k not in kept][: MEASURABLE - 1 - len(kept)]
    return (*sorted(kept), search.exits)


def chain_subsets(early: Sequence[int], most: int) -> list[Subset]:
    """All subsets of 0 to `most` of these exits, the smallest first."""
    return [subset for size in range(most + 1) for subset in combinations(early, size)]


def choose_exits(search: ExitSearch, candidates: Sequence[int] | None = None) -> ExitChoice:
    """Choose the exits to keep.

    Args:
        search: with measured times of all merged segments between candidates.
        candidates: the exits that may be kept, the last one included; default all.
    """
    early = tuple(k for k in candidates or range(1, search.exits) if k < search.exits)
    allowed = search.allowed(chain_subsets(early, MAX_EARLY))
    chosen = _smallest_equal(allowed, search.times.static_us)
    static = search.result(())
    assert static is not None
    if not _saves(chosen, search.times.static_us):
        chosen = static
    reasons = {k: _reason(search, chosen, k, early) for k in range(1, search.exits) if k not in chosen.exits}
    return ExitChoice(
        kept=(*chosen.exits, search.exits),
        dropped=reasons,
        mean_us=chosen.time.value,
        static_us=search.times.static_us,
        loss=chosen.loss.value,
        loss_error=chosen.loss.stderr,
        n=len(chosen.losses),
    )


def _evaluator(part: Trace, exits: Sequence[int], costs: Costs) -> TraceEvaluator:
    logits = part.logits[np.asarray(exits) - 1]
    scorer = Scorer("max-probability", False, (1.0,) * len(exits), logits.shape[2])
    return TraceEvaluator.of(replace(part, logits=logits), scorer, costs)


def _smallest_equal(allowed: Sequence[SubsetResult], static_us: float) -> SubsetResult:
    """The smallest subset as fast as the fastest one; of several, the fastest."""
    best = allowed[0]
    equal = []
    for one in allowed:
        slower = mean_with_error(one.times_us - best.times_us, one.groups)
        if slower.value <= max(slower.stderr, SAME * static_us):
            equal.append(one)
    return min(equal, key=lambda one: len(one.exits))


def _saves(result: SubsetResult, static_us: float) -> bool:
    saved = mean_with_error(static_us - result.times_us, result.groups)
    return saved.value >= max(MIN_SAVED * static_us, 2 * saved.stderr)


def _reason(search: ExitSearch, chosen: SubsetResult, k: int, candidates: Sequence[int]) -> str:
    """Why exit k is not kept."""
    if k not in candidates:
        return "the estimated times of other exits are better"
    if len(chosen.exits) >= MAX_EARLY:
        return f"at most {MAX_EARLY} early exits are kept, and others save more time"
    more = search.result(tuple(sorted((*chosen.exits, k))))
    if more is None or more.loss.value > MAX_LOSS + more.loss.stderr:
        return "with it the answers lose too much accuracy"
    return (
        f"it saves no clear time: with it an answer takes {more.time.value:.0f} us in the mean, without it "
        f"{chosen.time.value:.0f} us"
    )
