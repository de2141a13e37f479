"""Thresholds selected in time from traces: order, units, certificates, and what new data shows."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from mexit.calibrate.calibration import CalibrationConfig, CalibrationTraces, calibrate
from mexit.calibrate.certificates import CertificateRequest, policy_losses
from mexit.calibrate.hypothesis_tests import upper_rate
from mexit.calibrate.reject import RejectRequest
from mexit.calibrate.time_selection import select_by_time
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.budget import Budget
from mexit.core.cost import Costs
from mexit.core.policies_file import PolicyEntry, TraceRef
from mexit.core.scores import Scorer
from mexit.core.trace import Origin, Trace
from mexit.errors import RiskInfeasible

CLASSES = 4
MACS = Costs((100, 400, 1000), 800)
TIMES = Costs((300.0, 420.0, 1150.0), 1000.0, "us")
NO_SAVING = Costs((990.0, 1500.0, 2000.0), 1000.0, "us")


def random_trace(seed: int, samples: int, split: str, quality: tuple[float, ...] = (1.5, 2.5, 3.5)) -> Trace:
    """Logits whose confidence and accuracy grow with depth; the hardness of a sample is common to all exits."""
    rng = np.random.default_rng(seed)
    labels, hardness = rng.integers(0, CLASSES, samples), rng.exponential(size=samples)
    logits = rng.normal(size=(len(quality), samples, CLASSES))
    for k, strength in enumerate(quality):
        logits[k, np.arange(samples), labels] += 2 * strength / (0.5 + hardness)
    origin = Origin("m", "fp32", "ort", "fp32", split, "clean", "d")
    return Trace(
        logits.astype(np.float32), labels, np.arange(samples) + (10**6 if split != "calibration" else 0), origin
    )


def calibrated(
    seed: int, config: CalibrationConfig, samples: int = 500
) -> tuple[PolicyEntry, dict[tuple[str, str], Trace]]:
    """Policies in MACs, and their traces."""
    traces = {
        (split, "clean"): random_trace(3 * seed + i, samples, split)
        for i, split in enumerate(("calibration", "certification"))
    }
    pair = (traces["calibration", "clean"], None, traces["certification", "clean"], None)
    result = calibrate(CalibrationTraces(*pair), MACS, config)
    ref = TraceRef("t.npz", "0", "calibration", "clean", samples)
    entry = PolicyEntry(
        "ort", "fp32", "fp32", ref, (replace(ref, split="certification"),),
        result.scorer.measure, result.scorer.ensemble, result.scorer.temperatures, result.frontier, result.named,
        tuple(asdict(one) for one in result.certificates), result.drift,
        result.rejection.terms if result.rejection else None, {"night": "60%", "few": "300"},
    )  # fmt: skip
    return entry, traces


TWO_EXITS = (1.5, 3.5)
PLAIN = CalibrationConfig("max-probability", False)


def test_budgets_rise_in_time_and_never_cost_more_than_the_static_network() -> None:
    entry, traces = calibrated(0, PLAIN)
    timed = select_by_time(entry, traces, MACS, TIMES)
    assert (entry.unit, timed.unit) == ("macs", "us")
    limits = {name: timed.frontier[timed.named[name]].budget_us for name in ("low", "medium", "high", "full")}
    assert limits == {"low": 475, "medium": 650, "high": 825, "full": 1000}
    assert timed.frontier[timed.named["night"]].budget_us == 600
    assert "few" not in timed.named, "it is a number of MACs"
    for point in timed.frontier:
        assert point.calibration.mean_us <= point.budget_us * (1 + 1e-9)
        exit_us, exit_macs = (costs.of_exits(point.thresholds) for costs in (TIMES, MACS))
        assert point.calibration.mean_us == pytest.approx(np.dot(point.calibration.exits, exit_us) / 500)
        assert point.calibration.mean_macs == pytest.approx(np.dot(point.calibration.exits, exit_macs) / 500)
    times = [point.calibration.mean_us for point in timed.frontier]
    assert times == sorted(times)
    assert times[-1] == 1000


def test_the_selection_is_deterministic_and_scores_stay() -> None:
    entry, traces = calibrated(1, PLAIN)
    one, other = (select_by_time(entry, traces, MACS, TIMES) for _ in range(2))
    assert one == other
    assert (one.measure, one.ensemble, one.temperatures) == (entry.measure, entry.ensemble, entry.temperatures)
    assert [point.thresholds for point in one.frontier] != [point.thresholds for point in entry.frontier]


def test_all_budgets_are_the_static_network_where_no_exit_saves_time() -> None:
    entry, traces = calibrated(2, PLAIN)
    timed = select_by_time(entry, traces, MACS, NO_SAVING)
    for name in ("low", "medium", "high", "full"):
        point = timed.frontier[timed.named[name]]
        assert (point.thresholds, point.calibration.mean_us) == ((None, None), 1000)


def test_a_number_of_macs_bounds_the_expected_macs() -> None:
    entry, traces = calibrated(3, PLAIN)
    timed = select_by_time(entry, traces, MACS, TIMES)
    for macs in (150, 300, 500):
        point = timed.frontier[timed.frontier_index(Budget.parse(str(macs)), TIMES)]
        assert point.calibration.mean_macs <= macs
    assert timed.frontier[timed.frontier_index(Budget.parse("0.65ms"), TIMES)].budget_us <= 650


def test_traces_without_labels_are_enough() -> None:
    traces = {key: replace(trace, labels=None) for key, trace in calibrated(4, PLAIN)[1].items()}
    timed = select_by_time(calibrated(4, PLAIN)[0], traces, MACS, TIMES)
    point = timed.frontier[timed.named["medium"]]
    assert point.calibration.accuracy is None
    assert 500 < point.calibration.mean_us <= 650


def test_the_reject_bound_holds_for_the_new_thresholds() -> None:
    config = replace(PLAIN, reject=RejectRequest(0.1))
    entry, traces = calibrated(5, config, samples=1500)
    entry = replace(entry, reject=replace(entry.reject, reject_from="folder:other-things"))
    timed = select_by_time(entry, traces, MACS, TIMES)
    assert timed.reject == entry.reject
    assert timed.named["full"] == len(timed.frontier) - 1
    assert all(point.reject is not None and point.rejected.error <= 0.1 for point in timed.frontier)


def test_a_certificate_is_computed_again_or_absent() -> None:
    config = replace(PLAIN, certify=CertificateRequest(0.1))
    entry, traces = calibrated(6, config, samples=1000)
    timed = select_by_time(entry, traces, MACS, TIMES)
    (old,), (new,) = entry.certificates, timed.certificates
    assert new["id"] != old["id"]
    assert " us and more" in new["promise"]
    assert timed.named["certified"] == new["first"]
    certification = TraceEvaluator.of(
        traces["certification", "clean"], Scorer(timed.measure, False, timed.temperatures, CLASSES), MACS
    )
    losses = policy_losses(certification, timed.frontier[new["first"]].thresholds, "early-error")
    assert new["risk"] == {"clean": losses.mean()}
    lost = select_by_time(entry, traces, MACS, NO_SAVING)
    assert lost.certificates == ()
    assert "certified" not in lost.named


def test_the_target_is_the_cheapest_certified_budget_in_both_units() -> None:
    config = replace(PLAIN, target=CertificateRequest(0.05, loss="accuracy-gap"))
    entry, traces = calibrated(7, config, samples=2000)
    timed = select_by_time(entry, traces, MACS, TIMES)
    for one in (entry, timed):
        (certificate,) = one.certificates
        assert (certificate["name"], certificate["loss"]) == ("target", "accuracy-gap")
        assert one.named["target"] == certificate["first"] < len(one.frontier) - 1
        point = one.frontier[one.named["target"]]
        assert point.held_out.accuracy > one.frontier[-1].held_out.accuracy - 0.05
    with pytest.raises(RiskInfeasible, match=r"cannot certify .*\(accuracy-gap\).* samples would do"):
        calibrated(7, replace(PLAIN, target=CertificateRequest(0.005, loss="accuracy-gap")), samples=100)


LEVEL = 0.1  # 1 - the confidence of both certificates
CERTIFICATES = (
    {"name": "certified", "loss": "early-error", "method": "binomial", "max_risk": 0.08},
    {"name": "target", "loss": "accuracy-gap", "method": "betting", "max_risk": 0.08},
)


@pytest.mark.parametrize(
    "draws", [pytest.param(40, marks=pytest.mark.slow), pytest.param(1000, marks=pytest.mark.long)]
)
def test_expectations_and_certificates_hold_on_new_data(draws: int) -> None:
    """Random traces and times; new data is many times as much.

    The lower 99 % bound of the rate of certificates whose risk on new data is above the certified one must not exceed
    the level of the certificates.
    """
    entry, outside = two_exits(), {"accuracy": 0, "cost": 0}
    certified, broken = ({one["name"]: 0 for one in CERTIFICATES} for _ in range(2))
    scorer, compared = Scorer("max-probability", False, (1.0, 1.0), CLASSES), 0
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        first, last = np.cumsum(rng.uniform(50, 500, 2)).tolist()
        times = Costs((first, last), max(first, last * rng.uniform(0.75, 1)), "us")
        traces = {
            (split, "clean"): random_trace(3 * seed + i, 300, split, TWO_EXITS)
            for i, split in enumerate(("calibration", "certification"))
        }
        timed = select_by_time(entry, traces, Costs((100, 400), 380), times)
        new = TraceEvaluator.of(random_trace(10**6 + seed, 8000, "test", TWO_EXITS), scorer, times)
        for one in timed.certificates:
            thresholds = timed.frontier[timed.named[one["name"]]].thresholds
            certified[one["name"]] += any(threshold is not None for threshold in thresholds)
            broken[one["name"]] += policy_losses(new, thresholds, one["loss"]).mean() > one["max_risk"]
        point = timed.frontier[timed.named["medium"]]
        if all(threshold is None for threshold in point.thresholds):
            continue
        compared += 1
        held_out = point.held_out
        found = {"accuracy": new.accuracy(point.thresholds), "cost": new.cost(point.thresholds)}
        expected = {
            "accuracy": (held_out.accuracy, held_out.accuracy_error),
            "cost": (held_out.mean_us, held_out.us_error),
        }
        for name, (value, error) in expected.items():
            outside[name] += abs(found[name].value - value) > 1.96 * np.hypot(error, found[name].stderr)
    assert compared > 0.5 * draws
    for name, count in outside.items():  # 5 % by chance, with four standard errors
        assert count <= 0.05 * compared + 4 * np.sqrt(0.05 * 0.95 * compared), name
    assert min(certified.values()) > 0.5 * draws, "a test that certifies nothing violates nothing"
    for name, count in broken.items():
        assert 1 - upper_rate(draws - count, draws, 0.01) <= LEVEL, (name, count)


def two_exits() -> PolicyEntry:
    """Policies in MACs of a network with two exits, with the certificates that the new thresholds must have."""
    template, _ = calibrated(0, PLAIN)
    last = replace(template.frontier[-1], thresholds=(None,))
    common = {"confidence": 1 - LEVEL, "max_macs": None, "n": {"clean": 300}}
    certificates = tuple({**common, **one} for one in CERTIFICATES)
    return replace(template, temperatures=(1.0, 1.0), frontier=(last,), named={"full": 0}, certificates=certificates)
