"""Selects thresholds again in time: from the traces in a bundle and the times of one device.

Score, ensemble and temperatures stay those of the stored policies. The calibration trace selects thresholds for budgets
in microseconds, as `frontier` does in MACs. Certificates and reject thresholds belong to exact thresholds: they are
computed again on the certification trace, or left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

from mexit.calibrate.calibration import disagreement_bound
from mexit.calibrate.certificates import CertificateRequest, make_certificate
from mexit.calibrate.frontier import frontier
from mexit.calibrate.reject import RejectRequest, RejectSamples, add_reject_thresholds
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.budget import CERTIFIED, Budget
from mexit.core.cost import Costs
from mexit.core.exit_policy import Thresholds
from mexit.core.policies_file import FrontierPoint, Outcome, PolicyEntry
from mexit.core.scores import Scorer
from mexit.core.trace import UNKNOWN, Trace
from mexit.errors import MexitError

CLEAN = "clean"
Traces = Mapping[tuple[str, str], Trace]
"""Traces by split ("calibration", "certification") and condition ("clean", "unknown", or an attack)."""


@dataclass(frozen=True)
class _Evaluator:
    """One trace, evaluated in time and in MACs."""

    time: TraceEvaluator
    macs: TraceEvaluator

    def outcome(self, thresholds: Thresholds) -> Outcome:
        us = self.time.cost(thresholds)
        error = us.stderr if isfinite(us.stderr) else None  # infinite with a single group
        return replace(self.macs.outcome(thresholds), mean_us=us.value, us_error=error)


def select_by_time(entry: PolicyEntry, traces: Traces, macs: Costs, times: Costs) -> PolicyEntry:
    """Select thresholds in time. The same arguments give the same result.

    Args:
        entry: stored policies of the engine, in MACs.
        traces: those of the entry; ("calibration", "clean") and ("certification", "clean") are needed.
        macs, times: of leaving at each exit, in MACs and in microseconds.

    Returns:
        The entry with a frontier in microseconds. A budget of the user's own is among the named ones if it was typed as
        a share. Certificates that do not hold for the new thresholds are left out, with their names.

    Raises:
        KeyError: a trace is missing.
        RiskInfeasible: the bound of the reject option cannot be kept.
    """
    clean = traces["calibration", CLEAN]
    scorer = Scorer(entry.measure, entry.ensemble, entry.temperatures, clean.logits.shape[2])

    def evaluate(trace: Trace) -> _Evaluator:
        return _Evaluator(TraceEvaluator.of(trace, scorer, times), TraceEvaluator.of(trace, scorer, macs))

    evaluators = {key: evaluate(trace) for key, trace in traces.items()}
    calibration, certification = evaluators["calibration", CLEAN], evaluators["certification", CLEAN]
    attacked = next((one for (split, condition), one in evaluators.items() if _is_attack(split, condition)), None)
    found, named = frontier(calibration.time, None, None, _own_budgets(entry, times), "search")
    points = tuple(_in_both_units(point, calibration, certification, attacked) for point in found)
    terms = entry.reject
    if terms is not None:
        samples = [
            RejectSamples(evaluators[split, CLEAN].macs, evaluators[split, UNKNOWN].macs if terms.n_unknown else None)
            for split in ("calibration", "certification")
        ]
        bound = {} if terms.max_unknown is None else {"max_unknown": terms.max_unknown}
        request = RejectRequest(terms.max_error, terms.confidence, **bound)
        rejection = add_reject_thresholds(points, named, samples[0], samples[1], request)
        points, named = rejection.points, dict(rejection.named)
        terms = replace(rejection.terms, reject_from=terms.reject_from)
    certificates = _certificates(entry, points, evaluators, clean)
    named |= {name: certificate["first"] for name, certificate in certificates.items()}
    rates = [disagreement_bound(certification.macs, point) for point in points]
    return replace(
        entry,
        frontier=points,
        named=named,
        certificates=tuple(certificates.values()),
        drift={**entry.drift, "rates": rates},
        reject=terms,
    )


def _is_attack(split: str, condition: str) -> bool:
    return split == "certification" and condition not in (CLEAN, UNKNOWN)


def _own_budgets(entry: PolicyEntry, times: Costs) -> dict[str, Budget]:
    """The user's own budgets that are shares; those in MACs keep the thresholds that were selected in MACs."""
    own = {}
    for name, text in (entry.budgets or {}).items():
        budget = Budget.parse(text)
        with suppress(MexitError):  # below the time of exit 1
            budget.cost(times)
            own[name] = budget
    return own


def _in_both_units(
    point: FrontierPoint, calibration: _Evaluator, certification: _Evaluator, attacked: _Evaluator | None
) -> FrontierPoint:
    """A point of `frontier` for costs in time, whose `budget_macs` is in microseconds, with outcomes in both units."""
    outcome = calibration.outcome(point.thresholds)
    return FrontierPoint(
        budget_macs=outcome.mean_macs,
        thresholds=point.thresholds,
        calibration=outcome,
        held_out=certification.outcome(point.thresholds),
        attacked=attacked.outcome(point.thresholds) if attacked else None,
        budget_us=point.budget_macs,
    )


def _certificates(
    entry: PolicyEntry,
    points: tuple[FrontierPoint, ...],
    evaluators: Mapping[tuple[str, str], _Evaluator],
    clean: Trace,
) -> dict[str, dict[str, Any]]:
    """The certificates of an entry for new points, by the name of their cheapest budget; without those that fail."""
    certificates = {}
    for one in entry.certificates:
        conditions = {condition: evaluators.get(("certification", condition)) for condition in one["n"]}
        tested = {condition: evaluator.macs for condition, evaluator in conditions.items() if evaluator is not None}
        if len(tested) < len(conditions):
            continue
        request = CertificateRequest(one["max_risk"], one["confidence"], one["loss"], one["method"], one["max_macs"])
        with suppress(MexitError):
            name = one.get("name") or CERTIFIED
            certificates[name] = asdict(make_certificate(points, tested, request, clean.origin, name))
    return certificates
