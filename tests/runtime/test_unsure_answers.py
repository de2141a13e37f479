"""Unsure answers of a runtime: their fields, their statistics, and what they leave as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mexit import Bundle, Runtime
from mexit.core.budget import Budget
from mexit.core.policies_file import Policies
from mexit.errors import BudgetInfeasible


@pytest.fixture(scope="module")
def images(test_digits) -> np.ndarray:
    return (test_digits[0][:120, None] / np.float32(255)).astype(np.float32)


@pytest.fixture(scope="module")
def plain(mixed_bundle: Path) -> Runtime:
    return Runtime.open(mixed_bundle, "medium", threads=1)


@pytest.fixture(scope="module")
def runtime(reject_bundle: Path) -> Runtime:
    return Runtime.open(reject_bundle, "medium", threads=1)


@pytest.mark.parametrize("options", [{}, {"max_exit": 1}, {"max_exit": 2}, {"deadline_ms": 1e-9}, {"budget": "full"}])
def test_an_unsure_answer_has_no_label_and_everything_else(plain, runtime, images, options) -> None:
    expected, answers = plain(images, **options), runtime(images, **options)
    unsure = [one for one in answers if one.reason == "unsure"]
    assert 0 < len(unsure) < len(answers)
    assert runtime(images[:1], **options)[0].exit == expected[0].exit
    for one, certain in zip(answers, expected, strict=True):
        if one.reason == "unsure":
            assert (one.index, one.label) == (None, None)
            assert certain.reason != "confident"
        else:
            assert (one.index, one.label, one.reason) == (certain.index, certain.label, certain.reason)
        assert (one.exit, one.macs, one.saved_macs) == (certain.exit, certain.macs, certain.saved_macs)
        assert one.confidence == certain.confidence == one.probabilities.max()
        np.testing.assert_array_equal(one.probabilities, certain.probabilities)


def test_images_one_by_one_get_the_answers_of_the_batch(runtime, images) -> None:
    together = runtime(images)
    for row in range(0, len(images), 5):
        [alone] = runtime(images[row : row + 1])
        assert (alone.reason, alone.label, alone.exit) == (
            together[row].reason,
            together[row].label,
            together[row].exit,
        )


def test_json_has_null_in_place_of_the_label(runtime, images) -> None:
    unsure = next(one for one in runtime(images) if one.reason == "unsure")
    value = json.loads(json.dumps(unsure.to_json(), allow_nan=False))
    assert (value["index"], value["label"], value["reason"]) == (None, None, "unsure")
    assert len(value["probabilities"]) == 10


def test_statistics_count_unsure_answers_apart(reject_bundle: Path, images) -> None:
    runtime = Runtime.open(reject_bundle, "medium", threads=1)
    answers = runtime(images)
    snapshot = runtime.stats.snapshot()
    assert snapshot.unsure == sum(one.reason == "unsure" for one in answers) > 0
    assert snapshot.predictions == len(images) == sum(snapshot.exits)
    assert snapshot.macs == sum(one.macs for one in answers)


def test_a_row_without_tokens_counts_as_rate_limited_also_if_it_is_unsure(reject_bundle: Path, images) -> None:
    first = Bundle.open(reject_bundle).manifest.cumulative_macs[0]
    runtime = Runtime.open(
        reject_bundle, "full", threads=1, rate=first, burst=Bundle.open(reject_bundle).manifest.cumulative_macs[-1]
    )
    answers = runtime(images[:2])
    snapshot = runtime.stats.snapshot()
    assert snapshot.rate_limited == sum(one.exit < 3 for one in answers) > 0
    assert all(one.reason in ("unsure", "rate-limit") for one in answers if one.exit < 3)


def test_the_drift_watch_sees_the_same_early_answers(mixed_bundle: Path, reject_bundle: Path, images) -> None:
    watched = []
    for path in (mixed_bundle, reject_bundle):
        runtime = Runtime.open(path, "medium", threads=1)
        runtime.watch_drift(1.0, seed=0)
        runtime(images)
        runtime.drift_watch.join()
        watched.append(runtime.stats.snapshot().watch_macs)
        runtime.close()
    assert watched[0] == watched[1] > 0


def test_certificates_of_receipts_follow_the_reason_behind_an_unsure_answer(
    reject_bundle: Path, images, tmp_path
) -> None:
    runtime = Runtime.open(reject_bundle, "medium", threads=1)
    by_policy = [one.receipt.certificates for one in runtime(images, receipts=True)]
    forced = [one for one in runtime(images, receipts=True, max_exit=1) if one.reason == "unsure"]
    assert set(by_policy) == {runtime.begin(images[:1]).choice.certificates}
    assert forced
    assert all(one.receipt.certificates == () for one in forced)
    assert forced[0].receipt_json()["reason"] == "unsure"


def test_the_file_has_version_2_with_reject_thresholds_and_version_1_without(
    mixed_bundle: Path, reject_bundle: Path
) -> None:
    """A program that knows version 1 alone must not answer where it should be unsure."""
    versions = [json.loads((path / "policies.json").read_text())["version"] for path in (mixed_bundle, reject_bundle)]
    assert versions == [1, 2]
    bundle = Bundle.open(reject_bundle)
    policies = bundle.policies()
    again = Policies.from_json(json.loads(policies.to_bytes()), bundle.id, bundle.path)
    assert again == policies
    assert again.entries[0].frontier[3].reject is not None
    assert again.entries[0].reject.max_error == 0.02


def test_a_budget_below_the_first_point_that_keeps_the_bound_names_it(reject_bundle: Path, tmp_path: Path) -> None:
    entry = Bundle.open(reject_bundle).policies().entries[0]
    left = replace(entry, frontier=entry.frontier[20:], named={"full": 20})
    costs = Bundle.open(reject_bundle).manifest.costs
    with pytest.raises(BudgetInfeasible, match=r"the smallest one with at most 2.00% wrong answers is \d+"):
        left.frontier_index(Budget.parse("low"), costs)
