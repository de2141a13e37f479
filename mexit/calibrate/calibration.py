"""Everything that calibration decides, from traces: score, temperatures, thresholds, certificate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mexit.calibrate.certificates import Certificate, Request, certificate
from mexit.calibrate.frontier import TraceEvaluator, frontier
from mexit.calibrate.hypothesis_tests import upper_rate
from mexit.calibrate.score_selection import ScoreQuality, choose, rank_scores
from mexit.calibrate.temperature import fit
from mexit.core.budget import Budget
from mexit.core.cost import Costs
from mexit.core.policies import FrontierPoint
from mexit.core.scores import MEASURES, Scorer
from mexit.core.trace import Trace
from mexit.errors import BadInput, UsageError

AUTO = "auto"
DRIFT_ALPHA = 0.01
DRIFT_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Traces:
    """What calibration looks at.

    Attributes:
        calibration: chooses everything.
        calibration_attacked: helps to choose the score; None where there is none.
        certification: says what is promised, and chooses nothing.
        certification_attacked: likewise under attack; None where there is none.
    """

    calibration: Trace
    calibration_attacked: Trace | None
    certification: Trace
    certification_attacked: Trace | None

    def __post_init__(self) -> None:
        chosen_on = set(self.calibration.index.tolist())
        if chosen_on & set(self.certification.index.tolist()):
            raise BadInput("calibration and certification traces share samples: they must be disjoint")
        models = {trace.origin.model for trace in self.all}
        if len(models) > 1:
            raise BadInput(f"traces of {len(models)} models: {', '.join(sorted(model[:12] for model in models))}")

    @property
    def all(self) -> tuple[Trace, ...]:
        """Those that are there."""
        traces = (
            self.calibration,
            self.calibration_attacked,
            self.certification,
            self.certification_attacked,
        )
        return tuple(trace for trace in traces if trace is not None)


@dataclass(frozen=True)
class CalibrationConfig:
    """What to calibrate for.

    Attributes:
        measure: one of `MEASURES`, or "auto".
        ensemble: exit k answers with the mean of exits 1..k; None leaves it to "auto" (off for a named measure).
        policy: "search" or "geometric".
        budgets: further budgets by name.
        certify: what to certify, or None.
    """

    measure: str = AUTO
    ensemble: bool | None = None
    policy: str = "search"
    budgets: Mapping[str, Budget] | None = None
    certify: Request | None = None

    def __post_init__(self) -> None:
        if self.measure not in (AUTO, *MEASURES):
            raise UsageError(f"unknown measure '{self.measure}': choose from {AUTO}, {', '.join(MEASURES)}")


@dataclass(frozen=True)
class CalibrationResult:
    """What was decided.

    Attributes:
        scorer: measure, ensemble and temperatures.
        scores: how well every score ranks; empty without labels.
        frontier, named: see `core.policies.PolicyEntry`.
        certificate: or None if none was asked for.
        drift: what the drift watch compares with; see `PolicyEntry`.
    """

    scorer: Scorer
    scores: tuple[ScoreQuality, ...]
    frontier: tuple[FrontierPoint, ...]
    named: Mapping[str, int]
    certificate: Certificate | None
    drift: Mapping[str, Any]


def calibrate(traces: Traces, costs: Costs, wish: CalibrationConfig) -> CalibrationResult:
    """Decide everything.

    Args:
        traces: see `Traces`.
        costs: of leaving at each exit; with heads, those of exits where nobody leaves are not paid for.
        wish: see `CalibrationConfig`.

    Raises:
        BadInput: too few samples, or traces that do not fit.
        BudgetInfeasible, RiskInfeasible: what was asked for cannot be had.
    """
    clean = traces.calibration
    temperatures = (1.0,) * len(costs.cumulative) if clean.labels is None else fit(clean.logits, clean.labels)
    measure, ensemble, scores = _choose_score(traces, temperatures, wish)
    scorer = Scorer(measure, ensemble, temperatures, clean.logits.shape[2])
    judges = {"clean": TraceEvaluator(traces.certification, scorer, costs)}
    attacked = traces.certification_attacked
    if attacked is not None:
        judges[attacked.origin.condition] = TraceEvaluator(attacked, scorer, costs)
    points, named = frontier(
        TraceEvaluator(clean, scorer, costs),
        judges["clean"],
        judges[attacked.origin.condition] if attacked else None,
        wish.budgets or {},
        wish.policy,
    )
    found = None
    if wish.certify is not None:
        origin = clean.origin
        about = {"model": origin.model, "engine": origin.engine, "precision": origin.precision}
        found = certificate(points, judges, wish.certify, {**about, "data_sha256": origin.data_sha256})
        named = {**named, "certified": found.first}
    rates = [_disagreement_bound(judges["clean"], point) for point in points]
    drift = {"alpha": DRIFT_ALPHA, "confidence": DRIFT_CONFIDENCE, "rates": rates}
    return CalibrationResult(scorer, scores, points, named, found, drift)


def _disagreement_bound(judge: TraceEvaluator, point: FrontierPoint) -> float | None:
    """An upper bound for how often early answers differ from the full network's; None where nobody is early."""
    early = judge.exits(point.thresholds) < len(judge.costs.cumulative)
    if not early.any():
        return None
    differ = judge.answers(point.thresholds)[early] != judge.predictions[-1][early]
    bound = upper_rate(int(differ.sum()), len(differ), 1 - DRIFT_CONFIDENCE)
    return bound if bound < 1 else None


def _choose_score(
    traces: Traces, temperatures: tuple[float, ...], wish: CalibrationConfig
) -> tuple[str, bool, tuple[ScoreQuality, ...]]:
    if traces.calibration.labels is None:
        measure = MEASURES[0] if wish.measure == AUTO else wish.measure
        return measure, bool(wish.ensemble), ()
    seen = [trace for trace in (traces.calibration, traces.calibration_attacked) if trace is not None]
    scores = tuple(rank_scores(seen, temperatures))
    if wish.measure != AUTO:
        return wish.measure, bool(wish.ensemble), scores
    allowed = [quality for quality in scores if wish.ensemble is None or quality.ensemble == wish.ensemble]
    best = choose(allowed)
    return best.measure, best.ensemble, scores
