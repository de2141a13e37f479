"""Certificates: the points of a frontier whose risk is at most epsilon, with the confidence and the conditions.

Losses compare a policy with the full network on the same input:

    early-error     wrong early although the full network is correct (0/1)
    disagreement    another prediction than the full network's (0/1); needs no labels
    accuracy-gap    correct at the full network minus correct early (-1, 0, 1); bounds the loss of accuracy

Points are tested on the certification split, which is used for no selection, from the safest to the cheapest. Clean
and attacked data are certified together: every condition must pass at the full level. A bound on the mean cost is a
second sequence from the cheapest point; each of the two sequences then has half of the level.

Where the samples form groups (pictures of one object, film or burst), the test is the grouped one of `hypothesis_tests`
and counts groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log, log10
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.calibrate.hypothesis_tests import (
    MAX_SAMPLES,
    METHODS,
    are_grouped,
    certified_prefix,
    check_share,
    groups_needed,
    p_value,
    samples_needed,
)
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.atomic_io import sha256_bytes, to_json
from mexit.core.budget import CERTIFIED, format_cost, format_macs
from mexit.core.cost import MACS, MICROSECONDS
from mexit.core.exit_policy import Thresholds
from mexit.core.policies_file import FrontierPoint
from mexit.core.scores import Floats
from mexit.core.trace import Origin
from mexit.errors import RiskInfeasible, UsageError

LOSSES = ("early-error", "disagreement", "accuracy-gap")


@dataclass(frozen=True)
class CertificateRequest:
    """The guarantee to certify.

    Attributes:
        max_risk: epsilon, the largest mean loss, in (0, 1).
        confidence: 1 - delta, in (0, 1).
        loss: one of `LOSSES`.
        method: one of `hypothesis_tests.METHODS`, or "auto": binomial for 0/1 losses, betting for the accuracy gap.
        max_macs: bound on the mean cost in MACs, or None.
    """

    max_risk: float
    confidence: float = 0.95
    loss: str = "early-error"
    method: str = "auto"
    max_macs: float | None = None

    def __post_init__(self) -> None:
        check_share("--max-risk", self.max_risk)
        check_share("--confidence", self.confidence)
        if self.loss not in LOSSES:
            raise UsageError(f"unknown loss '{self.loss}': choose from {', '.join(LOSSES)}")
        if self.method != "auto" and self.method not in METHODS:
            raise UsageError(f"unknown risk method '{self.method}': choose from auto, {', '.join(METHODS)}")
        if self.resolved_method == "binomial" and self.loss == "accuracy-gap":
            raise UsageError("the binomial test needs losses of 0 or 1, not the accuracy gap: choose betting")

    @property
    def resolved_method(self) -> str:
        """The test, with "auto" resolved."""
        if self.method != "auto":
            return self.method
        return "betting" if self.loss == "accuracy-gap" else "binomial"

    @property
    def delta(self) -> float:
        """The level of each test sequence."""
        return (1 - self.confidence) / (1 if self.max_macs is None else 2)


@dataclass(frozen=True)
class Certificate:
    """A certified guarantee; its fields are those in `policies.json`.

    Attributes:
        id: first 16 hexadecimal digits of the sha256 of all other fields.
        loss, method, max_risk, confidence, max_macs: as requested.
        first, last: frontier indices; every point from first to last is certified.
        budget_macs: budget of the cheapest certified point.
        n: samples of the certification split, per condition.
        groups: groups that these samples belong to, per condition; None where each sample is its own group.
        risk: mean loss on them at the cheapest certified point, per condition.
        model, engine, precision, data_sha256: the certified model and engine, and the data set.
        promise, limits: the guarantee and its limits in words.
        name: of the budget of the cheapest certified point.
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
    groups: Mapping[str, int] | None
    risk: Mapping[str, float]
    model: str
    engine: str
    precision: str
    data_sha256: str
    promise: str
    limits: str
    name: str = CERTIFIED


def policy_losses(evaluator: TraceEvaluator, thresholds: Thresholds, loss: str) -> Floats:
    """The loss of every sample under a policy, (N,). Raises `UsageError` where the loss needs missing labels."""
    predictions, full = evaluator.answers(thresholds), evaluator.static
    if loss == "disagreement":
        return np.asarray(predictions != full, np.float64)
    if evaluator.labels is None:
        raise UsageError(f"the loss {loss} needs labels; disagreement needs none")
    correct, full_correct = predictions == evaluator.labels, full == evaluator.labels
    if loss == "early-error":
        return np.asarray(~correct & full_correct, np.float64)
    return np.asarray(full_correct.astype(np.float64) - correct)


def risk_is_rejected(losses: Floats, request: CertificateRequest, groups: NDArray[np.int64] | None = None) -> bool:
    """Whether losses (N,) in groups (N,) reject "the risk is above epsilon" at the level of the request."""
    losses, epsilon = _in_unit_interval(losses, request)
    return p_value(request.resolved_method, losses, epsilon, groups, request.delta) <= request.delta


def _in_unit_interval(losses: Floats, request: CertificateRequest) -> tuple[Floats, float]:
    """Losses and their bound; those of the accuracy gap are moved from [-1, 1] to [0, 1]."""
    if request.loss == "accuracy-gap":
        return (losses + 1) / 2, (request.max_risk + 1) / 2
    return losses, request.max_risk


def certify(
    frontier: Sequence[FrontierPoint], evaluators: Mapping[str, TraceEvaluator], request: CertificateRequest
) -> tuple[int, int]:
    """The certified range of a frontier.

    Args:
        frontier: by rising budget; the last point never exits early.
        evaluators: condition ("clean", or an attack) to the certification trace under it; all must pass.
        request: the guarantee.

    Returns:
        Indices of the first and the last certified point.

    Raises:
        RiskInfeasible: no point cheaper than the full network can be certified; the message names the measured risk
            and the number of samples or groups that would be enough.
        UsageError: the binomial test is asked for, but the samples form groups.
    """
    _resolve_method(request, evaluators)

    def passes(thresholds: Thresholds) -> bool:
        return all(
            risk_is_rejected(policy_losses(evaluator, thresholds, request.loss), request, evaluator.groups)
            for evaluator in evaluators.values()
        )

    points = [point.thresholds for point in frontier]
    first = len(points) - certified_prefix([passes(thresholds) for thresholds in reversed(points)])
    last = len(points) - 1
    if request.max_macs is not None:
        clean = next(iter(evaluators.values()))
        last = certified_prefix([_cost_passes(clean, thresholds, request) for thresholds in points]) - 1
    if first >= len(points) or first > last or points[first] == points[-1]:
        raise RiskInfeasible(_explain_failure(frontier, evaluators, request, first, last))
    return first, last


def make_certificate(
    frontier: Sequence[FrontierPoint],
    evaluators: Mapping[str, TraceEvaluator],
    request: CertificateRequest,
    origin: Origin,
    name: str = CERTIFIED,
) -> Certificate:
    """Certify a frontier and describe the result.

    Args:
        frontier, evaluators, request: see `certify`.
        origin: of the calibration trace; the certificate names its model, engine, precision and data set.
        name: of the budget of the cheapest certified point.

    Raises:
        RiskInfeasible: see `certify`.
    """
    first, last = certify(frontier, evaluators, request)
    risk = {
        condition: float(policy_losses(evaluator, frontier[first].thresholds, request.loss).mean())
        for condition, evaluator in evaluators.items()
    }
    values: dict[str, Any] = {
        "loss": request.loss,
        "method": _resolve_method(request, evaluators),
        "max_risk": request.max_risk,
        "confidence": request.confidence,
        "max_macs": request.max_macs,
        "first": first,
        "last": last,
        "budget_macs": frontier[first].budget_macs,
        "n": {condition: evaluator.scores.shape[1] for condition, evaluator in evaluators.items()},
        "groups": _group_counts(evaluators),
        "risk": risk,
        "model": origin.model,
        "engine": origin.engine,
        "precision": origin.precision,
        "data_sha256": origin.data_sha256,
        "promise": _promise(request, frontier[first], list(evaluators)),
        "limits": _limits(list(evaluators), _group_counts(evaluators)),
        "name": name,
    }
    return Certificate(id=sha256_bytes(to_json(values))[:16], **values)


def _cost_passes(evaluator: TraceEvaluator, thresholds: Thresholds, request: CertificateRequest) -> bool:
    """Whether the bound on the mean cost is certified on clean data; under attack the rate limiter bounds cost."""
    assert request.max_macs is not None
    largest = evaluator.costs.cumulative[-1]
    if request.max_macs >= largest:
        return True
    costs = evaluator.spent(thresholds) / largest
    return p_value("betting", costs, request.max_macs / largest, evaluator.groups) <= request.delta


def _resolve_method(request: CertificateRequest, evaluators: Mapping[str, TraceEvaluator]) -> str:
    """The test of these samples: the betting test where they form groups, unless another one was asked for."""
    if _group_counts(evaluators) is None:
        return request.resolved_method
    if request.method == "binomial":
        raise UsageError(
            "the binomial test needs independent samples, but the certification samples form groups (of one object, "
            "film or burst): choose betting or auto"
        )
    return "betting"


def _group_counts(evaluators: Mapping[str, TraceEvaluator]) -> dict[str, int] | None:
    """Number of groups per condition; None where each sample is its own group."""
    if not any(are_grouped(evaluator.groups) for evaluator in evaluators.values()):
        return None
    return {
        condition: evaluator.scores.shape[1] if evaluator.groups is None else len(np.unique(evaluator.groups))
        for condition, evaluator in evaluators.items()
    }


def _explain_failure(
    frontier: Sequence[FrontierPoint],
    evaluators: Mapping[str, TraceEvaluator],
    request: CertificateRequest,
    first: int,
    last: int,
) -> str:
    """The message of `RiskInfeasible`: the nearest certified budget, the measured risk, and the samples needed."""
    guarantee = f"risk {request.max_risk:g} ({request.loss}) at confidence {request.confidence:g}"
    if all(point.thresholds == frontier[-1].thresholds for point in frontier):
        return (
            f"{guarantee}: every budget of this bundle runs the static network, which loses nothing; there is no early "
            "exit to certify (mexit export --exits all --replace keeps every exit)"
        )
    fewest = min(evaluators.values(), key=_count)
    if (impossible := _too_few(fewest, request)) is not None:
        return impossible.format(guarantee=guarantee)
    index = last if request.max_macs is not None and first < len(frontier) else first - 1
    index = min(max(index, 0), len(frontier) - 1)
    losses = [policy_losses(evaluator, frontier[index].thresholds, request.loss) for evaluator in evaluators.values()]
    worst = max(range(len(losses)), key=lambda k: float(losses[k].mean()))
    evaluator, risk = list(evaluators.values())[worst], float(losses[worst].mean())
    unit, needed = _needed(losses[worst], evaluator.groups, request)
    remedy = f"would take {needed} {unit}"
    if needed is None:
        below = risk < request.max_risk
        remedy = f"would take more than {MAX_SAMPLES} {unit}" if below else f"no number of {unit} can certify"
    lowest = format_macs(frontier[min(first, len(frontier) - 1)].budget_macs)
    return (
        f"{guarantee} cannot be certified below {lowest}; the next point, "
        f"{format_macs(frontier[index].budget_macs)}, measured {risk:.4f} on {_describe(fewest)}, which {remedy}: "
        "raise the risk (--max-risk, --target-drop), or certify on more data"
    )


def _count(evaluator: TraceEvaluator) -> int:
    """Number of groups, or of samples where each is its own group."""
    return evaluator.scores.shape[1] if evaluator.groups is None else len(np.unique(evaluator.groups))


def _describe(evaluator: TraceEvaluator) -> str:
    samples = f"{evaluator.scores.shape[1]} samples"
    return f"{samples} in {_count(evaluator)} groups" if are_grouped(evaluator.groups) else samples


def _too_few(evaluator: TraceEvaluator, request: CertificateRequest) -> str | None:
    """Why not even samples without any loss would be enough, with a place for the guarantee; None if they would."""
    n = evaluator.scores.shape[1]
    if are_grouped(evaluator.groups):
        if risk_is_rejected(np.zeros(n), request, evaluator.groups):
            return None
        _, needed = _needed(np.zeros(n), evaluator.groups, request)
        enough = f"more than {MAX_SAMPLES} would be needed" if needed is None else f"{needed} would do"
        return (
            f"{_count(evaluator)} groups cannot certify {{guarantee}}, even without a single loss in their {n} "
            f"samples; {enough} (groups are objects, films or bursts, which a certificate counts)"
        )
    smallest = 1 - request.delta ** (1 / n)
    if smallest <= request.max_risk:
        return None
    needed = ceil(log(request.delta) / log(1 - request.max_risk))
    return (
        f"{n} certification samples cannot certify {{guarantee}}, even without a single loss: the smallest risk is "
        f"{_rounded_up(smallest):g}; {needed} samples would do"
    )


def _rounded_up(risk: float) -> float:
    """The smallest number with two significant digits that is not below the risk."""
    digits = 1 - floor(log10(risk))
    return ceil(risk * 10.0**digits) / 10.0**digits


def _needed(losses: Floats, groups: NDArray[np.int64] | None, request: CertificateRequest) -> tuple[str, int | None]:
    """What the test counts, and how many of them with such losses would be enough; None = no reasonable number."""
    if groups is not None and are_grouped(groups):
        scaled, epsilon = _in_unit_interval(losses, request)
        return "groups", groups_needed(scaled, epsilon, request.delta, groups)
    return "samples", samples_needed(request.max_risk, request.delta, max(float(losses.mean()), 0.0))


_LOSS_IN_WORDS: dict[str, Callable[[float], str]] = {
    "early-error": lambda risk: (
        f"at most {risk:.2%} of inputs are answered wrongly early though the full network is right"
    ),
    "disagreement": lambda risk: f"at most {risk:.2%} of inputs get another answer than the full network's",
    "accuracy-gap": lambda risk: f"accuracy is at most {100 * risk:.2f} points below the full network's",
}


def _promise(request: CertificateRequest, point: FrontierPoint, conditions: Sequence[str]) -> str:
    unit = MACS if point.budget_us is None else MICROSECONDS
    cost = f" and the mean cost is at most {format_macs(request.max_macs)}" if request.max_macs is not None else ""
    return (
        f"At budgets of {format_cost(point.limit, unit)} and more, "
        f"{_LOSS_IN_WORDS[request.loss](request.max_risk)}{cost}, "
        f"with confidence {request.confidence:.1%}, for inputs like the certification data: {'; '.join(conditions)}."
    )


def _limits(conditions: Sequence[str], groups: Mapping[str, int] | None) -> str:
    attack = (
        " Under attack it holds for inputs attacked in exactly that way, by an attacker who does not look at the "
        "thresholds; other attacks, and attacks on the policy itself, are not covered."
        if len(conditions) > 1
        else " Nothing is promised under attack."
    )
    counted = (
        f" It was measured on {min(groups.values())} groups (objects, films or bursts), which it takes for independent."
        if groups
        else ""
    )
    return f"It does not hold after the data has changed, nor for single inputs.{counted}{attack}"
