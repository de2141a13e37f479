"""Calibration from traces to a result: temperatures, confidence score, thresholds and certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mexit.calibrate.certificates import Certificate, CertificateRequest, make_certificate
from mexit.calibrate.frontier import frontier
from mexit.calibrate.hypothesis_tests import upper_mean
from mexit.calibrate.reject import RejectRequest, RejectResult, RejectSamples, add_reject_thresholds
from mexit.calibrate.score_selection import ScoreQuality, rank_scores, select_score
from mexit.calibrate.temperature import fit_temperatures, reliability
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.budget import TARGET, Budget
from mexit.core.cost import Costs
from mexit.core.policies_file import FrontierPoint, Outcome
from mexit.core.scores import AGREEMENT, MEASURES, Scorer
from mexit.core.trace import Trace
from mexit.errors import BadInput, UsageError

AUTO = "auto"
DRIFT_ALPHA = 0.01
DRIFT_CONFIDENCE = 0.95


@dataclass(frozen=True)
class CalibrationTraces:
    """The traces of one engine.

    Attributes:
        calibration: selects temperatures, score and thresholds.
        calibration_attacked: takes part in the selection of the score; None without an attack.
        certification: measures cost, accuracy and risk; selects nothing but the reject thresholds.
        certification_attacked: the same under attack; None without an attack.
        unknown, certification_unknown: pictures of other things, for the reject option; None without.
        data_size: number of groups in the whole data set, or of samples where they form no groups; None if unknown.

    Raises:
        BadInput: the two splits share samples or groups, or the traces are of different models.
    """

    calibration: Trace
    calibration_attacked: Trace | None
    certification: Trace
    certification_attacked: Trace | None
    unknown: Trace | None = None
    certification_unknown: Trace | None = None
    data_size: int | None = None

    def __post_init__(self) -> None:
        selection = set(self.calibration.index.tolist())
        if selection & set(self.certification.index.tolist()):
            raise BadInput("calibration and certification traces share samples: they must be disjoint")
        ids = [set(() if one.groups is None else one.groups.tolist()) for one in (self.calibration, self.certification)]
        if ids[0] & ids[1]:
            raise BadInput("calibration and certification traces share groups: a group must lie in one split")
        models = {trace.origin.model for trace in self.all}
        if len(models) > 1:
            raise BadInput(f"traces of {len(models)} models: {', '.join(sorted(model[:12] for model in models))}")

    @property
    def all(self) -> tuple[Trace, ...]:
        """The traces that exist."""
        clean_and_attacked = (
            self.calibration, self.calibration_attacked, self.certification, self.certification_attacked
        )  # fmt: skip
        traces = (*clean_and_attacked, self.unknown, self.certification_unknown)
        return tuple(trace for trace in traces if trace is not None)


@dataclass(frozen=True)
class CalibrationConfig:
    """The settings of a calibration.

    Attributes:
        measure: one of `core.scores.MEASURES`, or "auto".
        ensemble: exit k answers with the mean of exits 1..k; None = selected with "auto", else off.
        policy: one of `frontier.POLICIES`.
        budgets: further budgets by name.
        certify: the guarantee to certify, or None.
        reject: the bound on the error among the answered, or None.
        target: the loss of accuracy against the static network that the budget `target` is certified for, or None.
    """

    measure: str = AUTO
    ensemble: bool | None = None
    policy: str = "search"
    budgets: Mapping[str, Budget] = field(default_factory=dict)
    certify: CertificateRequest | None = None
    reject: RejectRequest | None = None
    target: CertificateRequest | None = None

    def __post_init__(self) -> None:
        if self.measure not in (AUTO, *MEASURES):
            raise UsageError(f"unknown measure '{self.measure}': choose from {AUTO}, {', '.join(MEASURES)}")
        if self.reject is not None and (self.ensemble or self.measure == AGREEMENT):
            raise UsageError(
                "--max-error also holds for the static network, which computes no earlier exits: leave out --ensemble "
                f"and --measure {AGREEMENT}"
            )


@dataclass(frozen=True)
class CalibrationResult:
    """The result of a calibration.

    Attributes:
        scorer: measure, ensemble and temperatures.
        scores: the quality of every score; empty without labels.
        frontier, named: see `core.policies_file.PolicyEntry`.
        certificates: those that were requested.
        drift: reference rates of the drift test; see `core.policies_file.PolicyEntry`.
        rejection: the result of the reject option, or None.
    """

    scorer: Scorer
    scores: tuple[ScoreQuality, ...]
    frontier: tuple[FrontierPoint, ...]
    named: Mapping[str, int]
    certificates: tuple[Certificate, ...]
    drift: Mapping[str, Any]
    rejection: RejectResult | None = None


def calibrate(traces: CalibrationTraces, costs: Costs, config: CalibrationConfig) -> CalibrationResult:
    """Calibrate one engine.

    Args:
        traces: without labels, temperatures stay 1, the score is not selected, and thresholds are geometric.
        costs: of leaving at each exit; and of the static network.
        config: the settings.

    Raises:
        BadInput: too few samples, or traces that do not fit together.
        BudgetInfeasible: a budget below the cheapest policy.
        RiskInfeasible: the guarantee or the bound on the error cannot be certified.
    """
    clean = traces.calibration
    temperatures = (
        (1.0,) * len(costs.cumulative) if clean.labels is None else fit_temperatures(clean.logits, clean.labels)
    )
    measure, ensemble, scores = _select_score(traces, temperatures, config)
    scorer = Scorer(measure, ensemble, temperatures, clean.logits.shape[2])
    calibration, held_out = (TraceEvaluator.of(one, scorer, costs) for one in (clean, traces.certification))
    evaluators, attacked = {"clean": held_out}, None
    if traces.certification_attacked is not None:
        attacked = TraceEvaluator.of(traces.certification_attacked, scorer, costs)
        evaluators[traces.certification_attacked.origin.condition] = attacked
    points, named = frontier(calibration, held_out, attacked, config.budgets, config.policy)
    rejection = None
    if config.reject is not None:
        rejection = add_reject_thresholds(
            points,
            named,
            RejectSamples(calibration, _evaluate(traces.unknown, scorer, costs)),
            RejectSamples(held_out, _evaluate(traces.certification_unknown, scorer, costs), traces.data_size),
            config.reject,
        )
        points, named = rejection.points, dict(rejection.named)
    certificates = []
    if config.certify is not None:
        certificates.append(make_certificate(points, evaluators, config.certify, clean.origin))
    if config.target is not None:
        certificates.append(make_certificate(points, {"clean": held_out}, config.target, clean.origin, TARGET))
    named |= {certificate.name: certificate.first for certificate in certificates}
    rates = [disagreement_bound(held_out, point) for point in points]
    drift = {"alpha": DRIFT_ALPHA, "confidence": DRIFT_CONFIDENCE, "rates": rates}
    return CalibrationResult(scorer, scores, points, named, tuple(certificates), drift, rejection)


def report(result: CalibrationResult, certification: Trace, numbers: Sequence[int]) -> dict[str, Any]:
    """The result as plain JSON values, with reliability on the certification trace; `numbers` of the exits, (E,)."""
    return {
        "scores": [
            {"measure": one.measure, "ensemble": one.ensemble, "auroc": [_finite(value) for value in one.auroc]}
            for one in result.scores
        ],
        "chosen": {"measure": result.scorer.measure, "ensemble": result.scorer.ensemble},
        "temperatures": list(result.scorer.temperatures),
        "reliability": reliability(result.scorer, certification.logits, certification.labels, numbers),
        "promised_against_seen": [
            {
                "budget_macs": point.budget_macs,
                "calibration": _cost_and_accuracy(point.calibration),
                "held_out": _cost_and_accuracy(point.held_out),
                "attacked": _cost_and_accuracy(point.attacked),
                **({"rejected": asdict(point.rejected)} if point.rejected else {}),
            }
            for point in result.frontier
        ],
    }


def _evaluate(trace: Trace | None, scorer: Scorer, costs: Costs) -> TraceEvaluator | None:
    return None if trace is None else TraceEvaluator.of(trace, scorer, costs)


def _select_score(
    traces: CalibrationTraces, temperatures: tuple[float, ...], config: CalibrationConfig
) -> tuple[str, bool, tuple[ScoreQuality, ...]]:
    """Measure, ensemble, and the quality of every score."""
    if traces.calibration.labels is None:
        measure = MEASURES[0] if config.measure == AUTO else config.measure
        return measure, bool(config.ensemble), ()
    both = [trace for trace in (traces.calibration, traces.calibration_attacked) if trace is not None]
    scores = tuple(rank_scores(both, temperatures))
    if config.measure != AUTO:
        return config.measure, bool(config.ensemble), scores
    allowed = [quality for quality in scores if config.ensemble is None or quality.ensemble == config.ensemble]
    if config.reject is not None:  # the static network answers too, and has no scores of earlier exits
        allowed = [quality for quality in allowed if not quality.ensemble and quality.measure != AGREEMENT]
    best = select_score(allowed)
    return best.measure, best.ensemble, scores


def disagreement_bound(evaluator: TraceEvaluator, point: FrontierPoint) -> float | None:
    """Upper confidence bound of the rate at which early predictions differ from the full network's.

    None if no sample exits early, or if the bound is 1.
    """
    early = evaluator.exits(point.thresholds) < len(evaluator.costs.cumulative)
    if not early.any():
        return None
    differ = (evaluator.answers(point.thresholds)[early] != evaluator.static[early]).astype(np.float64)
    groups = None if evaluator.groups is None else evaluator.groups[early]
    bound = upper_mean(differ, 1 - DRIFT_CONFIDENCE, groups)
    return bound if bound < 1 else None


def _cost_and_accuracy(outcome: Outcome | None) -> Mapping[str, Any] | None:
    return None if outcome is None else {"mean_macs": outcome.mean_macs, "accuracy": outcome.accuracy}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
