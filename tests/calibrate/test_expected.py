"""Expected against test results: what is compared, what lies outside, and what a bundle stores."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mexit.calibrate.expected import FILE, expected_and_test, load, save
from mexit.calibrate.frontier import frontier
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.cost import Costs
from mexit.core.policies_file import PolicyEntry, TraceRef
from mexit.core.scores import Scorer
from mexit.core.trace import Origin, Trace

COSTS = Costs((100, 400, 1000), 1000)
SCORER = Scorer("max-probability", False, (1.0,) * 3, 4)


def make_evaluator(
    samples: int, seed: int, *, signal: float = 1.5, group_size: int = 1, labelled: bool = True
) -> TraceEvaluator:
    """Logits whose confidence and accuracy grow with depth; pictures of one group are copies of one picture."""
    rng = np.random.default_rng(seed)
    count = samples // group_size
    labels = rng.integers(0, 4, count)
    logits = rng.normal(size=(3, count, 4))
    for k in range(3):
        logits[k, np.arange(count), labels] += signal + k
    member = np.repeat(np.arange(count), group_size)
    origin = Origin("m", "fp32", "ort", "fp32", "test", "clean", "d")
    trace = Trace(
        logits[:, member].astype(np.float32),
        labels[member] if labelled else None,
        np.arange(len(member)),
        origin,
        member if group_size > 1 else None,
    )
    return TraceEvaluator.of(trace, SCORER, COSTS)


def make_entry(evaluator: TraceEvaluator, policy: str = "geometric") -> PolicyEntry:
    points, named = frontier(evaluator, None, None, {}, policy)
    ref = TraceRef("f", "s", "calibration", "clean", 1)
    return PolicyEntry(
        "ort", "fp32", "fp32", ref, (), "max-probability", False, (1.0,) * 3, points, named, (), {}
    )  # fmt: skip


def beyond_chance(table: Mapping[str, Any]) -> list[str]:
    """The sentences but the one about a budget, which chance exceeds in half of the cases."""
    return [text for text in table["warnings"] if not text.startswith("expected above the budget")]


@pytest.fixture(scope="module")
def entry() -> PolicyEntry:
    return make_entry(make_evaluator(600, 0))


def test_alike_splits_agree_and_each_budget_has_its_row(entry: PolicyEntry) -> None:
    certification, test = make_evaluator(500, 1), make_evaluator(900, 2)
    table = expected_and_test(entry, certification, test, of=1800)
    assert [row["names"] for row in table["budgets"]] == [["low"], ["medium"], ["high"], ["full"]]
    assert (table["certification"], table["test"]) == (
        {"n": 500, "groups": None}, {"n": 900, "groups": None, "of": 1800}
    )  # fmt: skip
    assert (beyond_chance(table), table["missing"]) == ([], "")
    for row in table["budgets"]:
        thresholds = tuple(row["thresholds"])
        accuracy, cost = row["accuracy"], row["cost"]
        assert accuracy["expected"]["value"] == certification.hits(thresholds).mean()
        assert accuracy["test"]["value"] == test.hits(thresholds).mean()
        assert accuracy["difference"] == pytest.approx(accuracy["test"]["value"] - accuracy["expected"]["value"])
        assert cost["test"]["value"] == test.spent(thresholds).mean()
        p, q = accuracy["expected"]["value"], accuracy["test"]["value"]
        plain = 1.96 * np.sqrt(p * (1 - p) / 500 + q * (1 - q) / 900)
        assert accuracy["half_width"] == pytest.approx(plain, rel=0.1)
        assert (accuracy["outside"], cost["outside"], cost["too_high"]) == (False, False, False)
    json.dumps(table)


def test_classes_that_one_split_lacks_are_named(entry: PolicyEntry) -> None:
    certification, test = make_evaluator(500, 1), make_evaluator(900, 2)
    assert certification.labels is not None
    fewer = dataclasses.replace(certification, labels=np.where(certification.labels == 2, 1, certification.labels))
    names = ("stop", "yield", "no entry", "roundabout")
    sentences = expected_and_test(entry, fewer, test, of=900, classes=names)["warnings"]
    assert (
        "the certification split has no pictures of 1 of the classes of the test split (no entry): the expected "
        "results do not count them"
    ) in sentences
    assert any(
        "the test split has no pictures of 1" in one for one in expected_and_test(entry, test, fewer)["warnings"]
    )


def test_an_expected_cost_above_the_budget_is_named(entry: PolicyEntry) -> None:
    harder = make_evaluator(500, 1, signal=0.5)
    sentence = expected_and_test(entry, harder, None)["warnings"][0]
    expected = harder.spent(entry.by_policy()[0][1].thresholds).mean()
    assert sentence.startswith(f"expected above the budget: low {expected:.0f} of {entry.names['low']:.0f} MACs")
    assert "full" not in sentence, "full has one cost"
    assert not expected_and_test(entry, make_evaluator(500, 1, signal=3), None)["warnings"]


def test_groups_in_both_splits_are_counted(entry: PolicyEntry) -> None:
    certification, test = make_evaluator(500, 1, group_size=10), make_evaluator(900, 2, group_size=10)
    apart = dataclasses.replace(test, groups=np.asarray(test.groups) + 50)
    assert not any("groups" in one for one in expected_and_test(entry, certification, apart)["warnings"])
    assert (
        "50 of the 90 groups of the test split are in the certification split too"
        in (expected_and_test(entry, certification, test)["warnings"][-1])
    )


def test_other_test_images_are_outside_in_accuracy_and_cost(entry: PolicyEntry) -> None:
    table = expected_and_test(entry, make_evaluator(500, 1), make_evaluator(500, 2, signal=0.2), of=500)
    low, full = table["budgets"][0], table["budgets"][-1]
    assert low["accuracy"]["outside"]
    assert low["cost"]["too_high"]
    assert not full["cost"]["too_high"], "full has one cost"
    value, half = low["accuracy"]["expected"]["value"], low["accuracy"]["half_width"]
    sentence = next(text for text in table["warnings"] if text.startswith("low: the test accuracy"))
    assert f"{value - half:.1%} to {value + half:.1%}" in sentence
    assert any(text.startswith("low: the mean test cost") for text in table["warnings"])


def test_a_cost_just_above_the_expected_one_is_not_too_high(entry: PolicyEntry) -> None:
    """Significantly higher, but by less than 5 %."""
    certification, test = make_evaluator(90_000, 1), make_evaluator(90_000, 2, signal=1.45)
    cost = expected_and_test(entry, certification, test)["budgets"][1]["cost"]
    assert 0 < cost["difference"] < 0.05 * cost["expected"]["value"]
    assert (cost["outside"], cost["too_high"]) == (True, False)


def test_groups_are_counted_instead_of_pictures(entry: PolicyEntry) -> None:
    """Thirty pictures of one object make the interval five times as wide as independent pictures would."""
    grouped = [make_evaluator(3000, seed, group_size=30) for seed in (1, 2)]
    table = expected_and_test(entry, *grouped, of=3000)
    alone = [dataclasses.replace(evaluator, groups=None) for evaluator in grouped]
    plain = expected_and_test(entry, *alone, of=3000)
    assert (table["certification"]["groups"], table["test"]["groups"]) == (100, 100)
    wide, narrow = (one["budgets"][0]["accuracy"]["half_width"] for one in (table, plain))
    assert wide == pytest.approx(narrow * np.sqrt(30), rel=0.15)


def test_chance_alone_is_seldom_outside_if_groups_are_counted(entry: PolicyEntry) -> None:
    """Ten pictures of each object: about 5 % of the differences lie outside; counting pictures, half of them do."""
    outside = {True: 0, False: 0}
    entry = dataclasses.replace(entry, named={"low": entry.named["low"]})
    for seed in range(20):
        pair = [make_evaluator(800, 2 * seed + k, group_size=10) for k in (100, 101)]
        alone = [dataclasses.replace(evaluator, groups=None) for evaluator in pair]
        for grouped, evaluators in ((True, pair), (False, alone)):
            low = expected_and_test(entry, *evaluators)["budgets"][0]
            outside[grouped] += low["accuracy"]["outside"] + low["cost"]["outside"]
    assert outside[True] <= 6, "of 40"
    assert outside[False] >= 13, "of 40"


def test_a_single_group_has_no_interval(entry: PolicyEntry) -> None:
    test = make_evaluator(100, 2)
    test = dataclasses.replace(test, groups=np.zeros(100, np.int64))
    row = expected_and_test(entry, make_evaluator(500, 1), test)["budgets"][0]
    assert (row["accuracy"]["half_width"], row["accuracy"]["outside"], row["cost"]["too_high"]) == (None, False, False)
    assert row["accuracy"]["test"]["stderr"] is None


def test_without_labels_the_cost_alone_is_compared(entry: PolicyEntry) -> None:
    evaluators = [make_evaluator(400, seed, labelled=False) for seed in (1, 2)]
    for row in expected_and_test(entry, *evaluators)["budgets"]:
        assert row["accuracy"] is None
        assert row["cost"]["half_width"] is not None


def test_without_a_test_split_the_reason_is_stored(entry: PolicyEntry) -> None:
    table = expected_and_test(entry, make_evaluator(400, 1), None, missing="no test images")
    assert (table["test"], table["missing"], beyond_chance(table)) == (None, "no test images", [])
    row = table["budgets"][0]
    assert row["accuracy"]["expected"]["value"] > 0.5
    assert row["accuracy"]["test"] is row["cost"]["test"] is row["test_exits"] is None


def test_budgets_of_one_policy_share_a_row(entry: PolicyEntry) -> None:
    named = {**entry.named, "night": entry.named["low"], "high": entry.named["medium"]}
    table = expected_and_test(dataclasses.replace(entry, named=named), make_evaluator(400, 1), None)
    assert [row["names"] for row in table["budgets"]] == [["low", "night"], ["medium", "high"], ["full"]]
    assert len(set(table["budgets"][1]["budget_macs"])) == 1


def test_the_table_of_each_engine_is_kept_and_replaced(entry: PolicyEntry, tmp_path: Path) -> None:
    other = dataclasses.replace(entry, precision="int8", variant="int8")
    first, second = (expected_and_test(one, make_evaluator(400, 1), None, missing="a") for one in (entry, other))
    assert save(tmp_path, "model", first) == tmp_path / FILE
    save(tmp_path, "model", second)
    again = {**first, "missing": "b"}
    save(tmp_path, "model", again)
    assert load(tmp_path, "model", entry) == again
    assert load(tmp_path, "model", other) == second
    assert load(tmp_path, "another model", entry) is None
    save(tmp_path, "another model", second)
    assert load(tmp_path, "model", other) is None


def test_the_table_of_other_thresholds_is_not_shown(entry: PolicyEntry, tmp_path: Path) -> None:
    save(tmp_path, "model", expected_and_test(entry, make_evaluator(400, 1), None))
    assert load(tmp_path, "model", make_entry(make_evaluator(600, 9))) is None


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"model": "model", "entries": [1]}', b"\xff"])
def test_a_damaged_file_counts_as_none_and_is_replaced(entry: PolicyEntry, tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_bytes(content)
    assert load(tmp_path, "model", entry) is None
    table = expected_and_test(entry, make_evaluator(400, 1), None)
    save(tmp_path, "model", table)
    assert load(tmp_path, "model", entry) == table
