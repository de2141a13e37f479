"""Certificates keep their word when a population is at hand, and say why where they cannot be had."""

from __future__ import annotations

import numpy as np
import pytest

from mexit.calibrate.certificates import LOSSES, Request, certificate, certify, losses
from mexit.calibrate.frontier import TraceEvaluator, frontier
from mexit.core.cost import Costs
from mexit.core.scores import Scorer
from mexit.core.trace import Origin, Trace
from mexit.errors import RiskInfeasible, UsageError

COSTS = Costs((100, 400, 1000))
SCORER = Scorer("max-probability", False, (1.0,) * 3, 4)
ABOUT = {"model": "m", "engine": "ort", "precision": "fp32", "data_sha256": "d"}


def make_trace(samples: int, seed: int, worse: float = 0.0) -> Trace:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, samples)
    logits = rng.normal(size=(3, samples, 4)).astype(np.float32)
    for k in range(3):
        logits[k, np.arange(samples), labels] += 2.5 + k - worse
    origin = Origin("m", "fp32", "ort", "fp32", "certification", "clean", "d")
    return Trace(logits, labels, np.arange(samples), origin)


def judge_of(trace: Trace) -> TraceEvaluator:
    return TraceEvaluator(trace, SCORER, COSTS)


def pick(trace: Trace, rows: np.ndarray) -> Trace:
    return Trace(trace.logits[:, rows], trace.labels[rows], np.arange(len(rows)), trace.origin)


@pytest.fixture(scope="module")
def points():
    return frontier(judge_of(make_trace(2000, 0)), None, None, {}, "geometric")[0]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("method", ["auto", "hoeffding-bentkus", "betting"])
def test_coverage_over_1000_draws_from_a_population(points, loss, method) -> None:
    """A violation is a certified point whose risk on the population is above epsilon."""
    population = make_trace(20_000, 1, worse=0.8)
    judge = judge_of(population)
    true = [float(losses(judge, point.thresholds, loss).mean()) for point in points]
    # Just below the risk of a point in the middle, so that this point is the border.
    epsilon = 0.97 * min((risk for risk in true if risk > 0), key=lambda risk: abs(risk - 0.5 * max(true)))
    delta, n, draws = 0.1, 300, 1000
    table = np.stack([losses(judge, point.thresholds, loss) for point in points])
    rng = np.random.default_rng(2)
    request = Request(epsilon, 1 - delta, loss, method)
    violations, naive = 0, 0
    for _ in range(draws):
        rows = rng.integers(0, population.logits.shape[1], n)
        first = _first_certified(table[:, rows], request)
        violations += first < len(points) and true[first] > epsilon
        bold = np.flatnonzero(table[:, rows].mean(axis=1) <= epsilon)
        naive += bool(len(bold)) and true[bold[0]] > epsilon
    allowed = delta + 3 * np.sqrt(delta * (1 - delta) / draws)
    assert violations / draws <= allowed
    assert naive / draws > allowed, "the naive choice must be caught, or this test sees nothing"


def _first_certified(table: np.ndarray, request: Request) -> int:
    from mexit.calibrate.certificates import _one_passes

    for place in reversed(range(len(table))):
        if not _one_passes(table[place], request):
            return place + 1
    return 0


def test_conformal_keeps_the_mean_risk(points) -> None:
    judge = judge_of(make_trace(20_000, 1, worse=0.8))
    table = np.stack([losses(judge, point.thresholds, "early-error") for point in points])
    true = table.mean(axis=1)
    epsilon = 0.5 * float(true.max())
    rng = np.random.default_rng(2)
    request = Request(epsilon, 0.9, "early-error", "conformal")
    risks = []
    for _ in range(500):
        first = _first_certified(table[:, rng.integers(0, table.shape[1], 300)], request)
        risks.append(true[first] if first < len(true) else 0.0)
    assert np.mean(risks) <= epsilon + 3 * np.std(risks) / np.sqrt(500)


def test_a_stricter_risk_or_more_confidence_certifies_less(points) -> None:
    judges = {"clean": judge_of(make_trace(3000, 5))}
    firsts = [certify(points, judges, Request(risk, 0.9))[0] for risk in (0.04, 0.08, 0.2)]
    assert firsts == sorted(firsts, reverse=True)
    assert firsts[0] > firsts[2]
    sure = [certify(points, judges, Request(0.08, confidence))[0] for confidence in (0.8, 0.999)]
    assert sure[0] <= sure[1]


def test_clean_and_attacked_must_both_pass(points) -> None:
    clean, attacked = judge_of(make_trace(3000, 5)), judge_of(make_trace(3000, 6, worse=1.0))
    request = Request(0.1, 0.9)
    alone = certify(points, {"clean": clean}, request)[0]
    both = certify(points, {"clean": clean, "PGD": attacked}, request)[0]
    assert both > alone
    assert both == certify(points, {"PGD": attacked}, request)[0]


def test_a_cost_bound_is_certified_from_the_bold_end(points) -> None:
    judges = {"clean": judge_of(make_trace(3000, 5))}
    first, last = certify(points, judges, Request(0.2, 0.9, max_macs=700))
    assert first <= last < len(points) - 1
    assert points[last].calibration.mean_macs < 700
    loose, _ = certify(points, judges, Request(0.2, 0.9))
    assert first >= loose, "half of the level for each sequence certifies no more than all of it for one"


def test_disagreement_needs_no_labels(points) -> None:
    trace = make_trace(2000, 5)
    unlabelled = judge_of(Trace(trace.logits, None, trace.index, trace.origin))
    first, _ = certify(points, {"clean": unlabelled}, Request(0.2, 0.9, "disagreement"))
    assert first < len(points)
    with pytest.raises(UsageError, match="disagreement"):
        certify(points, {"clean": unlabelled}, Request(0.2, 0.9, "early-error"))


def test_certificate_says_what_it_promises_and_what_not(points) -> None:
    judges = {"clean": judge_of(make_trace(3000, 5)), "PGD-50 average": judge_of(make_trace(1000, 6))}
    found = certificate(points, judges, Request(0.1, 0.95), ABOUT)
    assert "with confidence 95.0%" in found.promise
    assert "PGD-50 average" in found.promise
    assert "does not look at the thresholds" in found.limits
    assert found.n == {"clean": 3000, "PGD-50 average": 1000}
    assert max(found.risk.values()) < 0.1
    assert found == certificate(points, judges, Request(0.1, 0.95), ABOUT)
    alone = certificate(points, {"clean": judges["clean"]}, Request(0.1, 0.95), ABOUT)
    assert "Nothing is promised under attack" in alone.limits
    assert alone.id != found.id


def test_too_few_samples_say_how_many_would_do(points) -> None:
    with pytest.raises(RiskInfeasible, match="299 samples would do"):
        certify(points, {"clean": judge_of(make_trace(100, 5))}, Request(0.01, 0.95))


def test_an_impossible_risk_names_what_was_measured(points) -> None:
    two = (points[0], points[-1])  # all at exit 1, or the full network
    with pytest.raises(RiskInfeasible, match=r"measured 0\.\d+ on 2000 samples"):
        certify(two, {"clean": judge_of(make_trace(2000, 5, worse=1.0))}, Request(0.01, 0.95))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_risk": 0.0},
        {"max_risk": 0.1, "confidence": 1.0},
        {"max_risk": 0.1, "loss": "error"},
        {"max_risk": 0.1, "method": "naive"},
        {"max_risk": 0.1, "loss": "accuracy-gap", "method": "binomial"},
        {"max_risk": 0.1, "method": "conformal", "max_macs": 500.0},
    ],
    ids=str,
)
def test_requests_that_make_no_sense_are_refused(wrong) -> None:
    with pytest.raises(UsageError):
        Request(**wrong)
