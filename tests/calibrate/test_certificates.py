"""Certificates are valid on a known population; infeasible ones are refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest

from mexit.calibrate.certificates import (
    CertificateRequest,
    certify,
    make_certificate,
    policy_losses,
    risk_is_rejected,
)
from mexit.calibrate.frontier import frontier
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.cost import Costs
from mexit.core.scores import Scorer
from mexit.core.trace import Origin, Trace
from mexit.errors import RiskInfeasible, UsageError

COSTS = Costs((100, 400, 1000))
SCORER = Scorer("max-probability", False, (1.0,) * 3, 4)
ORIGIN = Origin("m", "fp32", "ort", "fp32", "calibration", "clean", "d")


def make_trace(samples: int, seed: int, worse: float = 0.0) -> Trace:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, samples)
    logits = rng.normal(size=(3, samples, 4)).astype(np.float32)
    for k in range(3):
        logits[k, np.arange(samples), labels] += 2.5 + k - worse
    origin = Origin("m", "fp32", "ort", "fp32", "certification", "clean", "d")
    return Trace(logits, labels, np.arange(samples), origin)


def evaluator_of(trace: Trace) -> TraceEvaluator:
    return TraceEvaluator.of(trace, SCORER, COSTS)


def pick(trace: Trace, rows: np.ndarray) -> Trace:
    return Trace(trace.logits[:, rows], trace.labels[rows], np.arange(len(rows)), trace.origin)


@pytest.fixture(scope="module")
def points():
    return frontier(evaluator_of(make_trace(2000, 0)), None, None, {}, "geometric")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "method"),
    [("early-error", "auto"), ("early-error", "betting"), ("disagreement", "auto"), ("accuracy-gap", "auto")],
)
def test_coverage_over_1000_draws_from_a_population(points, loss, method) -> None:
    """At most a share delta of the draws certifies a point whose risk on the population is above epsilon."""
    population = make_trace(20_000, 1, worse=0.8)
    evaluator = evaluator_of(population)
    true = [float(policy_losses(evaluator, point.thresholds, loss).mean()) for point in points]
    # Just below the risk of a point in the middle, so that certifying this point is a violation.
    epsilon = 0.97 * min((risk for risk in true if risk > 0), key=lambda risk: abs(risk - 0.5 * max(true)))
    delta, n, draws = 0.1, 300, 1000
    table = np.stack([policy_losses(evaluator, point.thresholds, loss) for point in points])
    rng = np.random.default_rng(2)
    request = CertificateRequest(epsilon, 1 - delta, loss, method)
    violations, naive = 0, 0
    for _ in range(draws):
        rows = rng.integers(0, population.logits.shape[1], n)
        first = _first_certified(table[:, rows], request)
        violations += first < len(points) and true[first] > epsilon
        cheap = np.flatnonzero(table[:, rows].mean(axis=1) <= epsilon)
        naive += bool(len(cheap)) and true[cheap[0]] > epsilon
    allowed = delta + 3 * np.sqrt(delta * (1 - delta) / draws)
    assert violations / draws <= allowed
    assert naive / draws > allowed, "the naive selection must violate the risk, or the test has no power"


def _first_certified(table: np.ndarray, request: CertificateRequest) -> int:
    for index in reversed(range(len(table))):
        if not risk_is_rejected(table[index], request):
            return index + 1
    return 0


def test_a_stricter_risk_or_more_confidence_certifies_less(points) -> None:
    evaluators = {"clean": evaluator_of(make_trace(3000, 5))}
    firsts = [certify(points, evaluators, CertificateRequest(risk, 0.9))[0] for risk in (0.04, 0.08, 0.2)]
    assert firsts == sorted(firsts, reverse=True)
    assert firsts[0] > firsts[2]
    confident = [certify(points, evaluators, CertificateRequest(0.08, confidence))[0] for confidence in (0.8, 0.999)]
    assert confident[0] <= confident[1]


def test_clean_and_attacked_must_both_pass(points) -> None:
    clean, attacked = evaluator_of(make_trace(3000, 5)), evaluator_of(make_trace(3000, 6, worse=1.0))
    request = CertificateRequest(0.1, 0.9)
    alone = certify(points, {"clean": clean}, request)[0]
    both = certify(points, {"clean": clean, "PGD": attacked}, request)[0]
    assert both > alone
    assert both == certify(points, {"PGD": attacked}, request)[0]


def test_a_cost_bound_is_certified_from_the_cheapest_point(points) -> None:
    evaluators = {"clean": evaluator_of(make_trace(3000, 5))}
    first, last = certify(points, evaluators, CertificateRequest(0.2, 0.9, max_macs=700))
    assert first <= last < len(points) - 1
    assert points[last].calibration.mean_macs < 700
    loose, _ = certify(points, evaluators, CertificateRequest(0.2, 0.9))
    assert first >= loose, "two sequences at half of the level certify no more than one at the full level"


def test_disagreement_needs_no_labels(points) -> None:
    trace = make_trace(2000, 5)
    unlabelled = evaluator_of(Trace(trace.logits, None, trace.index, trace.origin))
    first, _ = certify(points, {"clean": unlabelled}, CertificateRequest(0.2, 0.9, "disagreement"))
    assert first < len(points)
    with pytest.raises(UsageError, match="disagreement"):
        certify(points, {"clean": unlabelled}, CertificateRequest(0.2, 0.9, "early-error"))


def test_a_certificate_states_its_guarantee_and_its_limits(points) -> None:
    evaluators = {"clean": evaluator_of(make_trace(3000, 5)), "PGD-50 average": evaluator_of(make_trace(1000, 6))}
    certificate = make_certificate(points, evaluators, CertificateRequest(0.1, 0.95), ORIGIN)
    assert "with confidence 95.0%" in certificate.promise
    assert "PGD-50 average" in certificate.promise
    assert "does not look at the thresholds" in certificate.limits
    assert certificate.n == {"clean": 3000, "PGD-50 average": 1000}
    assert max(certificate.risk.values()) < 0.1
    assert certificate == make_certificate(points, evaluators, CertificateRequest(0.1, 0.95), ORIGIN)
    alone = make_certificate(points, {"clean": evaluators["clean"]}, CertificateRequest(0.1, 0.95), ORIGIN)
    assert "Nothing is promised under attack" in alone.limits
    assert alone.id != certificate.id


def test_too_few_samples_are_refused_with_the_number_needed(points) -> None:
    with pytest.raises(RiskInfeasible, match="299 samples would do"):
        certify(points, {"clean": evaluator_of(make_trace(100, 5))}, CertificateRequest(0.01, 0.95))


def test_an_infeasible_risk_is_refused_with_the_measured_one(points) -> None:
    two = (points[0], points[-1])  # all at exit 1, or the full network
    with pytest.raises(RiskInfeasible, match=r"measured 0\.\d+ on 2000 samples"):
        certify(two, {"clean": evaluator_of(make_trace(2000, 5, worse=1.0))}, CertificateRequest(0.01, 0.95))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_risk": 0.0},
        {"max_risk": 0.1, "confidence": 1.0},
        {"max_risk": 0.1, "loss": "error"},
        {"max_risk": 0.1, "method": "naive"},
        {"max_risk": 0.1, "method": "conformal"},
        {"max_risk": 0.1, "method": "hoeffding-bentkus"},
        {"max_risk": 0.1, "loss": "accuracy-gap", "method": "binomial"},
    ],
    ids=str,
)
def test_invalid_requests_are_refused(wrong) -> None:
    with pytest.raises(UsageError):
        CertificateRequest(**wrong)
