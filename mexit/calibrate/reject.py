"""The reject option: thresholds below which an answer is withheld, so that the error among the answered is bounded.

An answer of exit k that did not reach the threshold of the exit is "unsure" below the reject threshold of exit k. That
concerns the last exit of the policy (the first one that no row passes), and exits at which `max_exit`, a deadline or
the rate limiter ended a row. For each policy of the frontier and each exit k, the hypothesis is "the error among the
answered is above `max_error` if exit k is the last one that may answer". Answers at earlier exits count. The answered
pictures are the sample of the test (selective risk: Y. Geifman, R. El-Yaniv, NeurIPS 2017), which holds in finite
samples; with groups, the grouped test holds.

Candidates for the threshold, their order and the first one come from the calibration split. On the certification split
they are tested from the first one to laxer ones, each at the full level, up to the first that is not rejected
(fixed-sequence testing, A. Angelopoulos et al., Learn then Test, 2021). The last rejected one is the threshold.

Pictures of other things ("unknowns") have no correct answer. A threshold must also pass a second test, at that level:
at most `max_unknown` of them are answered. A threshold that breaks a bound is chosen with a probability of at most the
level, because it has to pass the test of the bound that it breaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from math import log

import numpy as np
from numpy.typing import NDArray

from mexit.calibrate.hypothesis_tests import are_grouped, check_share, p_value
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.exit_policy import HIGHEST, LOWEST, Thresholds, should_exit
from mexit.core.policies_file import FrontierPoint, RejectOutcome, RejectTerms
from mexit.core.scores import Floats
from mexit.errors import RiskInfeasible, UsageError

CANDIDATES = 100  # thresholds of one exit, at evenly spaced shares of the rows that no threshold lets leave
MULTIPLES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # of the data, to say how much would be needed
MAX_REPEATED = 2_000_000  # samples
STEP, LARGEST = 0.005, 0.5  # of the `max_error` that a message suggests


@dataclass(frozen=True)
class RejectRequest:
    """The bound to keep.

    Attributes:
        max_error: the largest share of wrong answers among the answers given, in (0, 1).
        confidence: 1 - level, in (0, 1).
        max_unknown: the largest share of answered pictures of other things, in (0, 1); used where there are some.
    """

    max_error: float
    confidence: float = 0.95
    max_unknown: float = 0.1

    def __post_init__(self) -> None:
        check_share("--max-error", self.max_error)
        check_share("--confidence", self.confidence)
        check_share("--max-unknown", self.max_unknown)

    @property
    def delta(self) -> float:
        """The level of each test."""
        return 1 - self.confidence


@dataclass(frozen=True)
class RejectSamples:
    """The scored traces of one split.

    Attributes:
        known: pictures with labels.
        unknown: pictures of other things; None without.
        data_size: number of groups in the whole data set, or of pictures where they form no groups; None if unknown.
    """

    known: TraceEvaluator
    unknown: TraceEvaluator | None = None
    data_size: int | None = None


@dataclass(frozen=True)
class RejectResult:
    """A frontier with reject thresholds.

    Attributes:
        points: those at which the bound is certified, by rising budget.
        named: index in `points` of each named budget that is left.
        terms: the bound, the data, and both in words.
        unavailable: named budgets at which the answers of early exits alone break the bound.
    """

    points: tuple[FrontierPoint, ...]
    named: Mapping[str, int]
    terms: RejectTerms
    unavailable: tuple[str, ...]


def add_reject_thresholds(
    points: Sequence[FrontierPoint],
    named: Mapping[str, int],
    calibration: RejectSamples,
    certification: RejectSamples,
    request: RejectRequest,
) -> RejectResult:
    """Choose the reject thresholds of every point. Points without any are left out.

    Args:
        points, named: the frontier; its last point never exits early.
        calibration: selects the candidates and their order.
        certification: tests them.
        request: the bound.

    Raises:
        UsageError: the samples have no labels.
        RiskInfeasible: no threshold of the last point passes. The message says how much data would be enough.
    """
    if certification.known.labels is None:
        raise UsageError("--max-error needs labels: put the pictures into one folder per class")
    found: dict[Thresholds, tuple[Thresholds, RejectOutcome] | None] = {}
    kept: dict[int, FrontierPoint] = {}
    for index, point in enumerate(points):
        if point.thresholds not in found:
            found[point.thresholds] = _reject_thresholds(point.thresholds, calibration, certification, request)
        if chosen := found[point.thresholds]:
            kept[index] = replace(point, reject=chosen[0], rejected=chosen[1])
    if len(points) - 1 not in kept:
        raise RiskInfeasible(_explain_failure(points[-1].thresholds, calibration, certification, request))
    position = {index: i for i, index in enumerate(kept)}
    left = {name: position[index] for name, index in named.items() if index in position}
    unavailable = tuple(name for name in named if name not in left)
    return RejectResult(tuple(kept.values()), left, _terms(certification, request), unavailable)


def reject_outcome(samples: RejectSamples, point: FrontierPoint) -> RejectOutcome | None:
    """What the reject option of a frontier point does to other samples with labels; None without a reject option."""
    last = _last_exit(point.thresholds)
    if point.reject is None or point.rejected is None or (reject := point.reject[last - 1]) is None:
        return None
    return _Case.of(samples, point.thresholds, last).outcome(reject, point.rejected.exits)


def _last_exit(thresholds: Thresholds) -> int:
    """The first exit, from 1, that no row passes."""
    return thresholds.index(LOWEST) + 1 if LOWEST in thresholds else len(thresholds) + 1


@dataclass(frozen=True)
class _Rows:
    """The answers of the rows of a trace if exit k is the last one that may answer.

    Attributes:
        early: whether a row reached the threshold of an exit up to k that other rows pass, (N,); it is answered in any
            case.
        score: at exit k, (N,).
        wrong: whether the answer is wrong, (N,); true without labels.
        groups: group ids, (N,), or None.
    """

    early: NDArray[np.bool_]
    score: Floats
    wrong: NDArray[np.bool_]
    groups: NDArray[np.int64] | None

    @staticmethod
    def of(evaluator: TraceEvaluator, thresholds: Thresholds, k: int) -> _Rows:
        exits = evaluator.exits(thresholds)
        early = exits <= min(k, _last_exit(thresholds) - 1)
        answers = evaluator.predictions[np.where(early, exits, k) - 1, np.arange(len(exits))]
        wrong = np.ones(len(exits), np.bool_) if evaluator.labels is None else answers != evaluator.labels
        return _Rows(early, evaluator.scores[k - 1], wrong, evaluator.groups)

    def answered(self, reject: float) -> NDArray[np.bool_]:
        """Which rows are answered, (N,)."""
        return self.early | should_exit(self.score, reject)

    def repeated(self, times: int) -> _Rows:
        """The same rows several times, in groups of their own each time."""
        groups = self.groups
        if groups is not None:
            step = groups.max() + 1
            groups = np.concatenate([groups + step * i for i in range(times)])
        return _Rows(np.tile(self.early, times), np.tile(self.score, times), np.tile(self.wrong, times), groups)


@dataclass(frozen=True)
class _Case:
    """Known and unknown rows of one split, for one policy and one last exit."""

    known: _Rows
    unknown: _Rows | None

    @staticmethod
    def of(samples: RejectSamples, thresholds: Thresholds, k: int) -> _Case:
        unknown = None if samples.unknown is None else _Rows.of(samples.unknown, thresholds, k)
        return _Case(_Rows.of(samples.known, thresholds, k), unknown)

    def passes(self, reject: float, request: RejectRequest) -> bool:
        """Whether both bounds are certified at the level of the request."""
        known, unknown = self.known, self.unknown
        answered = known.answered(reject)
        if not answered.any():
            return False
        if not _bound_holds(known.wrong, answered, known.groups, request.max_error, request.delta):
            return False
        if unknown is None:
            return True
        every = np.ones(len(unknown.wrong), np.bool_)
        return _bound_holds(unknown.answered(reject), every, unknown.groups, request.max_unknown, request.delta)

    def evidence(self, reject: float, request: RejectRequest, weights: tuple[float, float]) -> float:
        """About -log of the larger p-value on data of other sizes; `weights` are those sizes over the present ones."""
        answered = self.known.answered(reject)
        values = [weights[0] * _evidence(int(self.known.wrong[answered].sum()), int(answered.sum()), request.max_error)]
        if self.unknown is not None:
            answers = self.unknown.answered(reject)
            values.append(weights[1] * _evidence(int(answers.sum()), len(answers), request.max_unknown))
        return min(values)

    def outcome(self, reject: float, exits: tuple[int, ...]) -> RejectOutcome:
        answered = self.known.answered(reject)
        unknown = None if self.unknown is None else float(self.unknown.answered(reject).mean())
        error = float(self.known.wrong[answered].mean()) if answered.any() else 0.0
        return RejectOutcome(float(answered.mean()), error, unknown, exits)

    def repeated(self, times: int) -> _Case:
        return _Case(self.known.repeated(times), None if self.unknown is None else self.unknown.repeated(times))


def _reject_thresholds(
    thresholds: Thresholds, calibration: RejectSamples, certification: RejectSamples, request: RejectRequest
) -> tuple[Thresholds, RejectOutcome] | None:
    """The reject threshold of every exit and their outcome; None if the last exit has none.

    An exit at which none is certified withholds every answer that did not reach the threshold of the exit. So do the
    exits after the last one of the policy, which only rows with a NaN score reach.
    """
    last = _last_exit(thresholds)
    chosen: list[float | None] = []
    for k in range(1, last + 1):
        case = _Case.of(certification, thresholds, k)
        sequence = _sequence(_Case.of(calibration, thresholds, k), case, request)
        chosen.append(_last_passed(case, sequence, request))
    reject = chosen[-1]
    if reject is None:
        return None
    beyond = range(last + 1, len(thresholds) + 2)
    exits = (*(k for k, value in enumerate(chosen, start=1) if value is not None), *beyond)
    filled = (*(HIGHEST if value is None else value for value in chosen), *(HIGHEST for _ in beyond))
    return filled, _Case.of(certification, thresholds, last).outcome(reject, exits)


def _last_passed(case: _Case, sequence: Sequence[float], request: RejectRequest) -> float | None:
    """The last threshold before the first that does not pass; None if the first one does not."""
    passed = list(takewhile(lambda reject: case.passes(reject, request), sequence))
    return passed[-1] if passed else None


def _sequence(calibration: _Case, certification: _Case, request: RejectRequest) -> list[float]:
    """The candidates in the order of the tests, from strict to lax, chosen by the calibration split.

    The first one is the strictest with at least half of the largest evidence. Far more evidence than the level needs is
    not necessary; where there is not even twice as much, the first one has the largest evidence.
    """
    candidates = _candidates(calibration.known)
    weights = _ratio(certification.known, calibration.known), _ratio(certification.unknown, calibration.unknown)
    evidence = np.array([calibration.evidence(reject, request, weights) for reject in candidates])
    largest = evidence.max()
    enough = max(largest / 2, min(largest, 2 * log(1 / request.delta)))
    return candidates[int(np.argmax(evidence >= enough)) :]


def _candidates(rows: _Rows) -> list[float]:
    """Falling thresholds between scores of rows that no threshold lets leave: from no answer to all of them."""
    scores = rows.score[~rows.early]
    distinct = np.unique(scores[~np.isnan(scores)])[::-1]
    middles = (distinct[:-1] + distinct[1:]) / 2
    if len(middles) > CANDIDATES:
        middles = middles[np.linspace(0, len(middles) - 1, CANDIDATES).astype(np.int64)]
    return [HIGHEST, *middles.tolist(), LOWEST]


def _bound_holds(
    losses: NDArray[np.bool_], rows: NDArray[np.bool_], groups: NDArray[np.int64] | None, bound: float, level: float
) -> bool:
    """Whether "the mean loss of these rows is above the bound" is rejected at the level; losses (N,)."""
    of_rows = None if groups is None else groups[rows]
    return p_value("binomial", losses[rows].astype(np.float64), bound, of_rows, level) <= level


def _evidence(losses: int, n: int, bound: float) -> float:
    """About -log of the p-value of `losses` of n (Chernoff's bound); negative above the bound.

    One more loss is assumed: few rows without any loss are little evidence that other rows have none.
    """
    rate = (losses + 1) / (n + 1)
    parts = ((rate, bound), (1 - rate, 1 - bound))
    divergence = sum(p * log(p / q) for p, q in parts if p > 0)
    return n * divergence if rate < bound else -n * divergence


def _ratio(one: _Rows | None, other: _Rows | None) -> float:
    """Independent units of `one` for each picture of `other`: groups, or pictures where each is its own group."""
    if one is None or other is None:
        return 1.0
    return (_group_count(one.groups) or len(one.score)) / len(other.score)


def _explain_failure(
    thresholds: Thresholds, calibration: RejectSamples, certification: RejectSamples, request: RejectRequest
) -> str:
    """The message of `RiskInfeasible`: what was measured at the first threshold, and what would be enough."""
    k = _last_exit(thresholds)
    case, selecting = _Case.of(certification, thresholds, k), _Case.of(calibration, thresholds, k)
    reject = _sequence(selecting, case, request)[0]
    measured, known = case.outcome(reject, ()), case.known
    bound = f"an error of at most {request.max_error:.2%} among the answered"
    unknown = ""
    if measured.unknown_answered is not None:
        bound += f", with at most {request.max_unknown:.2%} of other things answered,"
        unknown = f", and {measured.unknown_answered:.2%} of the other things are answered"
    return (
        f"{bound} cannot be certified at confidence {request.confidence:g} on {_count(known)}: at the most promising "
        f"threshold {measured.coverage:.1%} are answered, {measured.error:.2%} of them wrong{unknown}; "
        f"{_remedy(case, reject, request, certification.data_size)}; {_smallest_error(selecting, case, request)}"
    )


def _remedy(case: _Case, reject: float, request: RejectRequest, data_size: int | None) -> str:
    for times in MULTIPLES:
        if times * len(case.known.score) > MAX_REPEATED:
            break
        if case.repeated(times).passes(reject, request):
            needed = _count(case.repeated(times).known)
            others = "" if case.unknown is None else f" and {_count(case.unknown.repeated(times))} of other things"
            unit = "pictures" if _group_count(case.known.groups) is None else "groups"
            total = f"; the whole data set has {data_size} {unit} and needs {times * data_size}" if data_size else ""
            return f"about {needed}{others} with such results would be enough{total}"
    return "no number of pictures with such results would be enough: train longer"


def _smallest_error(calibration: _Case, certification: _Case, request: RejectRequest) -> str:
    """Whether a larger bound can be certified: the smallest `max_error`, in steps of `STEP`, and its coverage."""

    def coverage(steps: int) -> float | None:
        larger = replace(request, max_error=round(steps * STEP, 6))
        reject = _last_passed(certification, _sequence(calibration, certification, larger), larger)
        return None if reject is None else certification.outcome(reject, ()).coverage

    low, high = int(request.max_error / STEP + 1e-9), round(LARGEST / STEP)
    answered = coverage(high) if low < high else None
    if answered is None:
        larger = "" if certification.unknown is None else "; a larger --max-unknown may be"
        return f"on this data no --max-error up to {LARGEST:g} can be certified at that confidence{larger}"
    while high - low > 1:
        middle = (low + high) // 2
        found = coverage(middle)
        low, high, answered = (middle, high, answered) if found is None else (low, middle, found)
    return (
        f"type --max-error {high * STEP:g}, which is the smallest that this data certifies at that confidence, with "
        f"{answered:.1%} answered"
    )


def _count(rows: _Rows) -> str:
    groups = _group_count(rows.groups)
    return f"{len(rows.score)} pictures" if groups is None else f"{groups} groups ({len(rows.score)} pictures)"


def _group_count(groups: NDArray[np.int64] | None) -> int | None:
    """Number of groups; None where each picture is its own group."""
    return None if groups is None or not are_grouped(groups) else len(np.unique(groups))


def _terms(certification: RejectSamples, request: RejectRequest) -> RejectTerms:
    known, unknown = certification.known, certification.unknown
    return RejectTerms(
        max_error=request.max_error,
        confidence=request.confidence,
        max_unknown=None if unknown is None else request.max_unknown,
        n=known.scores.shape[1],
        groups=_group_count(known.groups),
        n_unknown=None if unknown is None else unknown.scores.shape[1],
    )
