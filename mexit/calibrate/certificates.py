"""Certificates: which points of a frontier keep a risk below epsilon, with what confidence, and under what.

Losses, all against the full network on the same input:

    early-error     wrong early though right at the full network (0/1)
    disagreement    another answer than the full network's (0/1); needs no labels
    accuracy-gap    right at the full network minus right early (-1, 0, 1); a bound on lost accuracy

Points are tested on the certification split, which chose nothing, from safe to bold. Clean and attacked data
are certified at once: the p-value is the larger of the two, tested at the full level. A bound on the mean cost is
a second sequence from the bold end; then each sequence has half of the level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import log
from typing import Any

import numpy as np

from mexit.calibrate.frontier import TraceEvaluator
from mexit.calibrate.hypothesis_tests import (
    METHODS,
    certified_prefix,
    conformal_allows,
    p_value,
    samples_needed,
)
from mexit.core.atomic_io import sha256_bytes, to_json
from mexit.core.budget import format_macs
from mexit.core.policies import FrontierPoint
from mexit.core.policy import Thresholds
from mexit.core.scores import Floats
from mexit.errors import RiskInfeasible, UsageError

LOSSES = ("early-error", "disagreement", "accuracy-gap")


@dataclass(frozen=True)
class Request:
    """What is to be certified.

    Attributes:
        max_risk: epsilon.
        confidence: 1 - delta.
        loss: one of `LOSSES`.
        method: one of `risk.METHODS`; "auto" takes the exact binomial tail for 0/1 losses, betting otherwise.
        max_macs: a bound on the mean cost, or None.
    """

    max_risk: float
    confidence: float = 0.95
    loss: str = "early-error"
    method: str = "auto"
    max_macs: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.max_risk < 1 or not 0 < self.confidence < 1:
            raise UsageError(
                "--max-risk and --confidence must lie between 0 and 1, "
                f"found {self.max_risk} and {self.confidence}"
            )
        if self.loss not in LOSSES:
            raise UsageError(f"unknown loss '{self.loss}': choose from {', '.join(LOSSES)}")
        if self.method != "auto" and self.method not in METHODS:
            raise UsageError(f"unknown method '{self.method}': choose from auto, {', '.join(METHODS)}")
        if self.resolved_method == "binomial" and self.loss == "accuracy-gap":
            raise UsageError("an accuracy gap is not 0 or 1: choose betting or hoeffding-bentkus")
        if self.resolved_method == "conformal" and self.max_macs is not None:
            raise UsageError("conformal risk control bounds a mean and cannot be combined with a cost bound")

    @property
    def resolved_method(self) -> str:
        """The method that "auto" stands for."""
        if self.method != "auto":
            return self.method
        return "betting" if self.loss == "accuracy-gap" else "binomial"

    @property
    def delta(self) -> float:
        """The level of each sequence."""
        return (1 - self.confidence) / (1 if self.max_macs is None else 2)


@dataclass(frozen=True)
class Certificate:
    """What was certified; stored in `policies.json` as it is.

    Attributes:
        id: sha256 over everything else, 16 digits.
        loss, method, max_risk, confidence, max_macs: as requested.
        first, last: places in the frontier; every point from first to last is certified.
        budget_macs: of the cheapest certified point.
        n: samples of the certification split, per condition.
        risk: measured there at the cheapest certified point, per condition.
        model, engine, precision, data_sha256: of what was certified, on which data.
        promise, limits: in words.
    """

    id: str
    loss: str
    method: str
    max_risk: float
    confidence: float
    max_macs: float | None
    first: int
    last: int
    budget_macs: float
    n: Mapping[str, int]
    risk: Mapping[str, float]
    model: str
    engine: str
    precision: str
    data_sha256: str
    promise: str
    limits: str


def losses(judge: TraceEvaluator, thresholds: Thresholds, loss: str) -> Floats:
    """One loss a sample, (N,)."""
    answers, full = judge.answers(thresholds), judge.predictions[-1]
    if loss == "disagreement":
        return np.asarray(answers != full, np.float64)
    if judge.labels is None:
        raise UsageError(f"the loss {loss} needs labels; disagreement does without")
    right, full_right = answers == judge.labels, full == judge.labels
    if loss == "early-error":
        return np.asarray(~right & full_right, np.float64)
    return np.asarray(full_right.astype(np.float64) - right)


def certify(
    frontier: Sequence[FrontierPoint], judges: Mapping[str, TraceEvaluator], request: Request
) -> tuple[int, int]:
    """The certified stretch of a frontier, (first, last) place.

    Args:
        frontier: by rising budget; the last point never leaves early.
        judges: condition ("clean", an attack) to the certification trace under it; all must pass.
        request: see `Request`.

    Raises:
        RiskInfeasible: nothing cheaper than the full network can be certified; says what could be, and from how
            many samples.
    """
    points = [point.thresholds for point in frontier]
    from_safe = [_passes(judges, points[place], request) for place in reversed(range(len(points)))]
    first = len(points) - certified_prefix(from_safe)
    last = len(points) - 1
    if request.max_macs is not None:
        last = certified_prefix([_cost_passes(judges, thresholds, request) for thresholds in points]) - 1
    full_macs = frontier[-1].calibration.mean_macs
    if first >= len(points) or first > last or frontier[first].calibration.mean_macs >= full_macs:
        raise RiskInfeasible(_why_not(frontier, judges, request, first, last))
    return first, last


def certificate(
    frontier: Sequence[FrontierPoint],
    judges: Mapping[str, TraceEvaluator],
    request: Request,
    about: Mapping[str, str],
) -> Certificate:
    """Certify and write it down; `about` holds model, engine, precision, data_sha256."""
    first, last = certify(frontier, judges, request)
    risk = {
        name: float(losses(judge, frontier[first].thresholds, request.loss).mean())
        for name, judge in judges.items()
    }
    values: dict[str, Any] = {
        "loss": request.loss,
        "method": request.resolved_method,
        "max_risk": request.max_risk,
        "confidence": request.confidence,
        "max_macs": request.max_macs,
        "first": first,
        "last": last,
        "budget_macs": frontier[first].budget_macs,
        "n": {name: judge.scores.shape[1] for name, judge in judges.items()},
        "risk": risk,
        **about,
        "promise": _promise(request, frontier[first].budget_macs, list(judges)),
        "limits": _limits(list(judges)),
    }
    return Certificate(id=sha256_bytes(to_json(values))[:16], **values)


def to_json_value(found: Certificate) -> dict[str, Any]:
    """As `policies.json` stores it."""
    return asdict(found)


def _passes(judges: Mapping[str, TraceEvaluator], thresholds: Thresholds, request: Request) -> bool:
    """Whether every condition rejects "risk above epsilon": the largest p-value is at most delta."""
    return all(_one_passes(losses(judge, thresholds, request.loss), request) for judge in judges.values())


def _one_passes(values: Floats, request: Request) -> bool:
    epsilon = request.max_risk
    if request.loss == "accuracy-gap":  # from [-1, 1] to [0, 1]
        values, epsilon = (values + 1) / 2, (epsilon + 1) / 2
    if request.resolved_method == "conformal":
        return conformal_allows(values, epsilon)
    return p_value(request.resolved_method, values, epsilon) <= request.delta


def _cost_passes(judges: Mapping[str, TraceEvaluator], thresholds: Thresholds, request: Request) -> bool:
    """The cost is bounded on clean data: under attack it rises, and the rate limiter is the bound."""
    assert request.max_macs is not None
    judge = next(iter(judges.values()))
    full = judge.costs.cumulative[-1]
    if request.max_macs >= full:
        return True
    spent = np.asarray(judge.exit_macs(thresholds), np.float64)[judge.exits(thresholds) - 1] / full
    return p_value("betting", spent, request.max_macs / full) <= request.delta


def _why_not(
    frontier: Sequence[FrontierPoint],
    judges: Mapping[str, TraceEvaluator],
    request: Request,
    first: int,
    last: int,
) -> str:
    """What stands in the way, the nearest that could be certified, and the samples that the wish would take."""
    n = min(judge.scores.shape[1] for judge in judges.values())
    asked = f"risk {request.max_risk:g} ({request.loss}) at confidence {request.confidence:g}"
    smallest = 1 - request.delta ** (1 / n)
    if smallest > request.max_risk:
        needed = int(np.ceil(log(request.delta) / log(1 - request.max_risk)))
        return (
            f"{n} certification samples cannot certify {asked}, even without a single loss: the smallest risk is "
            f"{smallest:.2g}; {needed} samples would do"
        )
    place = last if request.max_macs is not None and first < len(frontier) else first - 1
    place = min(max(place, 0), len(frontier) - 1)
    thresholds = frontier[place].thresholds
    worst = max(float(losses(judge, thresholds, request.loss).mean()) for judge in judges.values())
    samples = samples_needed(request.max_risk, request.delta, max(worst, 0.0))
    wish = f"would take {samples} samples" if samples else "no number of samples can certify"
    lowest = format_macs(frontier[min(first, len(frontier) - 1)].budget_macs)
    return (
        f"{asked} cannot be certified below {lowest}; the next point, {format_macs(frontier[place].budget_macs)}, "
        f"measured {worst:.4f} on {n} samples, which {wish}: raise --max-risk, or certify on more data"
    )


_WORDS: dict[str, Callable[[float], str]] = {
    "early-error": lambda risk: (
        f"at most {risk:.2%} of inputs are answered wrongly early though the full network is right"
    ),
    "disagreement": lambda risk: f"at most {risk:.2%} of inputs get another answer than the full network's",
    "accuracy-gap": lambda risk: f"accuracy is at most {100 * risk:.2f} points below the full network's",
}


def _promise(request: Request, budget_macs: float, conditions: Sequence[str]) -> str:
    how = (
        "on average over calibrations"
        if request.resolved_method == "conformal"
        else f"with confidence {request.confidence:.1%}"
    )
    cost = f" and the mean cost is at most {format_macs(request.max_macs)}" if request.max_macs is not None else ""
    return (
        f"At budgets of {format_macs(budget_macs)} and more, {_WORDS[request.loss](request.max_risk)}{cost}, "
        f"{how}, for inputs like the certification data: {'; '.join(conditions)}."
    )


def _limits(conditions: Sequence[str]) -> str:
    attack = (
        " Under attack it holds for inputs attacked in exactly that way, by an attacker who does not look at the "
        "thresholds; other attacks, and attacks on the policy itself, are not covered."
        if len(conditions) > 1
        else " Nothing is promised under attack."
    )
    return f"It does not hold after the data has changed, nor for single inputs.{attack}"
