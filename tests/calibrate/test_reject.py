"""The reject option keeps its bound on known populations, answers as much as it can, and says what it cannot do."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from mexit.calibrate.frontier import frontier
from mexit.calibrate.reject import RejectRequest, RejectResult, RejectSamples, add_reject_thresholds
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.cost import Costs
from mexit.core.exit_policy import HIGHEST, LOWEST, Policy
from mexit.core.policies_file import FrontierPoint
from mexit.errors import RiskInfeasible, UsageError

COSTS = Costs((100, 400, 1000), 1000)
LEVELS = (0.0, 0.7, 1.4)  # how much better each exit is than the first


def population(samples: int, seed: int, group: int = 1, shift: float = 0.0) -> TraceEvaluator:
    """Scores whose error falls with the score; pictures of a group have the same difficulty and mostly one answer."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(samples // group), group)
    ease = rng.normal(0.9 + shift, 1.2, samples // group)[groups]
    luck = rng.uniform(size=samples // group)[groups]
    scores = np.stack([ease + level + rng.normal(0, 0.3, samples) for level in LEVELS])
    wrong = luck < 1 / (1 + np.exp(2 * np.stack([ease + level for level in LEVELS])))
    labels = rng.integers(0, 5, samples)
    return TraceEvaluator(scores, np.where(wrong, (labels + 1) % 5, labels), labels, COSTS, groups)


def unknown(samples: int, seed: int, shift: float = -2.5) -> TraceEvaluator:
    return replace(population(samples, seed, shift=shift), labels=None)


def pick(evaluator: TraceEvaluator, rows: np.ndarray) -> TraceEvaluator:
    labels = None if evaluator.labels is None else evaluator.labels[rows]
    groups = None if evaluator.groups is None else evaluator.groups[rows]
    return TraceEvaluator(evaluator.scores[:, rows], evaluator.predictions[:, rows], labels, COSTS, groups)


def points_of(evaluator: TraceEvaluator, *thresholds: tuple[float | None, ...]) -> list[FrontierPoint]:
    return [FrontierPoint(place, one, evaluator.outcome(one), None, None) for place, one in enumerate(thresholds)]


FULL = (None, None)


def add(calibration, certification, request, *thresholds, others=(None, None), size=None) -> RejectResult:
    points = points_of(calibration, *thresholds, FULL)
    named = {f"budget {place}": place for place in range(len(points))}
    split = (RejectSamples(calibration, others[0]), RejectSamples(certification, others[1], size))
    return add_reject_thresholds(points, named, *split, request)


def error_and_coverage(evaluator: TraceEvaluator, point: FrontierPoint) -> tuple[float, float]:
    """By the rule of the runtime, `Policy.unsure`."""
    exits = evaluator.exits(point.thresholds)
    policy = Policy("margin", False, (1.0,) * 3, point.thresholds, point.reject)
    rows = np.arange(len(exits))
    unsure = policy.unsure(exits, evaluator.scores[exits - 1, rows], exits < 3)
    wrong = evaluator.predictions[exits - 1, rows] != evaluator.labels
    return float(wrong[~unsure].mean()), float((~unsure).mean())


def test_the_outcome_is_that_of_the_rule_of_the_runtime() -> None:
    calibration, certification = population(800, 0), population(800, 1)
    result = add(calibration, certification, RejectRequest(0.02), (3.5, 4.0), (None, 3.0))
    assert len(result.points) == 3
    for point in result.points:
        error, coverage = error_and_coverage(certification, point)
        assert (point.rejected.error, point.rejected.coverage) == (error, coverage)
        assert error <= 0.02
        assert 0.5 < coverage < 1
    assert result.terms.n == 800
    assert result.terms.groups is None


@pytest.mark.parametrize("grouped", [False, True], ids=["pictures", "groups"])
def test_the_bound_holds_at_its_level_over_draws_of_groups(grouped: bool) -> None:
    """With 6 alike pictures per group, the picture-wise test breaks the bound too often, the grouped one does not."""
    everything = population(60_000, 1, group=6)
    calibration = population(1200, 2, group=6)
    request, rng = RejectRequest(0.05, 0.9), np.random.default_rng(3)
    draws, broken, coverages = 60, 0, []
    for _ in range(draws):
        chosen = rng.integers(0, 10_000, 150)
        rows = (6 * chosen[:, None] + np.arange(6)).ravel()
        sample = pick(everything, rows)
        sample = replace(sample, groups=np.repeat(np.arange(150), 6) if grouped else None)
        try:
            [point] = add(calibration, sample, request).points
        except RiskInfeasible:
            continue
        error, coverage = error_and_coverage(everything, point)
        broken += error > 0.05
        coverages.append(coverage)
    allowed = 0.1 + 3 * np.sqrt(0.1 * 0.9 / draws)
    assert (broken / draws <= allowed) == grouped, f"{broken} of {draws}"
    assert np.median(coverages) > 0.5


def test_the_more_data_the_more_is_answered_up_to_the_best_threshold() -> None:
    everything = population(60_000, 1)
    coverages = []
    for n in (1500, 5000, 20_000):
        [point] = add(population(2000, 2), population(n, 3), RejectRequest(0.02)).points
        coverages.append(error_and_coverage(everything, point)[1])
    assert coverages == sorted(coverages)
    order = np.argsort(-everything.scores[2])
    wrong = everything.predictions[2, order] != everything.labels[order]
    best = np.flatnonzero(np.cumsum(wrong) <= 0.02 * np.arange(1, len(wrong) + 1)).max() / len(wrong)
    assert best - 0.05 < coverages[-1] <= best + 0.02


def test_points_whose_early_answers_break_the_bound_are_left_out_with_their_names() -> None:
    calibration, certification = population(800, 0), population(800, 1)
    result = add(calibration, certification, RejectRequest(0.02), (-9.0, -9.0), (3.5, 4.0))
    assert [point.thresholds for point in result.points] == [(3.5, 4.0), FULL]
    assert dict(result.named) == {"budget 1": 0, "budget 2": 1}
    assert result.unavailable == ("budget 0",)


def test_every_exit_has_a_threshold_and_the_bound_holds_where_it_says_so() -> None:
    calibration, certification = population(3000, 0), population(3000, 1)
    result = add(calibration, certification, RejectRequest(0.05), (3.0, None))
    for point in result.points:
        assert point.rejected.exits == (1, 2, 3)
        for k in (1, 2, 3):
            exits = np.minimum(certification.exits(point.thresholds), k)
            rows = np.arange(len(exits))
            score = certification.scores[exits - 1, rows]
            confident = (exits == 1) & (score >= (point.thresholds[0] or np.inf))
            unsure = Policy("margin", False, (1.0,) * 3, point.thresholds, point.reject).unsure(exits, score, confident)
            wrong = certification.predictions[exits - 1, rows] != certification.labels
            assert 0 < unsure.sum() < len(rows)
            assert wrong[~unsure].mean() <= 0.05


def test_an_exit_that_cannot_keep_the_bound_withholds_its_forced_answers() -> None:
    calibration, certification = population(800, 0), population(800, 1)
    random = np.random.default_rng(2)
    for evaluator in (calibration, certification):
        evaluator.predictions[0] = random.integers(0, 5, 800)
    [point] = add(calibration, certification, RejectRequest(0.05)).points
    assert point.rejected.exits == (2, 3)
    assert point.reject[0] == HIGHEST > point.reject[1]


@pytest.mark.parametrize(("thresholds", "last"), [((LOWEST, None), 1), ((3.5, LOWEST), 2), ((LOWEST, LOWEST), 1)])
def test_a_policy_that_never_reaches_the_last_exit_withholds_answers_at_the_exit_that_no_row_passes(
    thresholds, last
) -> None:
    calibration, certification = population(3000, 0), population(3000, 1)
    point = add(calibration, certification, RejectRequest(0.05), thresholds).points[0]
    assert point.thresholds == thresholds
    error, coverage = error_and_coverage(certification, point)
    assert (point.rejected.error, point.rejected.coverage) == (error, coverage)
    assert error <= 0.05
    assert 0.1 < coverage < 1
    assert point.reject[last:] == (HIGHEST,) * (3 - last)
    assert set(range(last, 4)) <= set(point.rejected.exits)


def test_pictures_of_other_things_tighten_the_threshold_until_few_are_answered() -> None:
    calibration, certification = population(2000, 0), population(2000, 1)
    [alone] = add(calibration, certification, RejectRequest(0.02)).points
    others = unknown(400, 5), unknown(400, 6)
    [both] = add(calibration, certification, RejectRequest(0.02, max_unknown=0.05), others=others).points
    everything = unknown(40_000, 7)
    answered = {point: float((everything.scores[2] >= point.reject[2]).mean()) for point in (alone, both)}
    assert answered[both] <= 0.05 < answered[alone]
    assert both.rejected.unknown_answered == float((others[1].scores[2] >= both.reject[2]).mean())
    assert both.rejected.coverage < alone.rejected.coverage
    assert alone.rejected.unknown_answered is None


def test_other_things_answered_by_early_exits_make_a_point_unavailable() -> None:
    calibration, certification = population(2000, 0), population(2000, 1)
    others = unknown(400, 5, shift=0.0), unknown(400, 6, shift=0.0)
    result = add(calibration, certification, RejectRequest(0.1, max_unknown=0.1), (1.0, 2.0), others=others)
    assert result.unavailable == ("budget 0",)


def test_too_little_data_is_infeasible_and_says_how_much_would_be_enough() -> None:
    with pytest.raises(RiskInfeasible, match=r"on 60 pictures: at the most promising.* about (\d+) pictures") as error:
        add(population(800, 0), population(60, 1), RejectRequest(0.02))
    assert error.value.exit_code == 3
    grouped = replace(population(120, 1, group=6), groups=np.repeat(np.arange(20), 6))
    with pytest.raises(RiskInfeasible, match=r"on 20 groups \(120 pictures\).* about \d+ groups \(\d+ pictures\) with"):
        add(population(800, 0), grouped, RejectRequest(0.02))


def test_an_amount_that_is_said_to_be_enough_is_enough() -> None:
    calibration, certification = population(800, 0), population(60, 1)
    with pytest.raises(RiskInfeasible) as error:
        add(calibration, certification, RejectRequest(0.02))
    times = int(str(error.value).partition(" about ")[2].split()[0]) // 60
    rows = np.tile(np.arange(60), times)
    assert add(calibration, replace(pick(certification, rows), groups=None), RejectRequest(0.02)).points


@pytest.mark.parametrize(("group", "unit"), [(1, "pictures"), (6, "groups")])
def test_the_numbers_of_the_whole_data_set_are_named(group: int, unit: str) -> None:
    certification = population(60 * group, 1, group=group)
    with pytest.raises(RiskInfeasible, match="would be enough") as error:
        add(population(800, 0), certification, RejectRequest(0.02), size=500)
    found = re.search(rf"about (\d+) {unit}.*; the whole data set has 500 {unit} and needs (\d+)", str(error.value))
    assert found is not None, error.value
    assert int(found[2]) / 500 == int(found[1]) / 60
    with pytest.raises(RiskInfeasible) as error:
        add(population(800, 0), certification, RejectRequest(0.02))
    assert "whole data set" not in str(error.value)


@pytest.mark.parametrize("group", [1, 6])
def test_the_smallest_error_that_is_named_can_be_certified_and_a_smaller_one_cannot(group: int) -> None:
    calibration, certification = population(800, 0), population(60 * group, 1, group=group)
    with pytest.raises(RiskInfeasible, match="which is the smallest that this data certifies") as error:
        add(calibration, certification, RejectRequest(0.02))
    found = re.search(r"--max-error (0\.\d+), which is the smallest .*, with (\d+\.\d)% answered", str(error.value))
    assert found is not None, error.value
    smallest = float(found[1])
    [point] = add(calibration, certification, RejectRequest(smallest)).points
    assert f"{100 * point.rejected.coverage:.1f}" == found[2]
    with pytest.raises(RiskInfeasible):
        add(calibration, certification, RejectRequest(smallest - 0.005))


def test_a_network_that_guesses_is_infeasible_with_any_number_of_pictures() -> None:
    guess = population(500, 0)
    guess.predictions[:] = np.random.default_rng(0).integers(0, 5, guess.predictions.shape)
    with pytest.raises(
        RiskInfeasible, match="no number of pictures with such results would be enough: train longer; on this data no"
    ) as error:
        add(guess, guess, RejectRequest(0.02))
    assert "no --max-error up to 0.5 can be certified at that confidence" in str(error.value)


def test_few_pictures_of_other_things_are_infeasible_with_both_numbers() -> None:
    others = unknown(10, 5), unknown(10, 6)
    with pytest.raises(RiskInfeasible, match=r"about \d+ pictures and \d+ pictures of other things"):
        add(population(800, 0), population(800, 1), RejectRequest(0.02), others=others)


def test_scores_that_are_not_numbers_are_unsure() -> None:
    calibration, certification = population(2000, 0, shift=3), population(2000, 1, shift=3)
    certification.scores[2, :50] = np.nan
    [point] = add(calibration, certification, RejectRequest(0.02)).points
    assert point.rejected.coverage == 1 - 50 / 2000


def test_labels_and_sensible_bounds_are_needed() -> None:
    without = replace(population(100, 0), labels=None)
    with pytest.raises(UsageError, match="--max-error needs labels"):
        add(without, without, RejectRequest(0.02))
    for bad in ({"max_error": 0.0}, {"max_error": 1.5}, {"max_error": 0.1, "confidence": 1.0}):
        with pytest.raises(UsageError, match="must lie between 0 and 1"):
            RejectRequest(**bad)
    with pytest.raises(UsageError, match=r"found 5: write 0\.05 for 5%"):
        RejectRequest(5)
    with pytest.raises(UsageError, match="must lie between 0 and 1"):
        RejectRequest(0.1, max_unknown=0.0)


def test_a_whole_frontier_keeps_its_order_and_its_full_network() -> None:
    calibration, certification = population(1500, 0), population(1500, 1)
    points, named = frontier(calibration, certification, None, {}, "geometric")
    split = RejectSamples(calibration), RejectSamples(certification)
    result = add_reject_thresholds(points, named, *split, RejectRequest(0.05))
    assert result.points[-1].thresholds == FULL
    budgets = [point.budget_macs for point in result.points]
    assert budgets == sorted(budgets)
    assert {points[named[name]].budget_macs for name in result.named} == {
        result.points[index].budget_macs for index in result.named.values()
    }
