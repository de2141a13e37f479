"""`Runtime`: budgets, inputs, predictions and the ledger."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
from PIL import Image

from mexit import BadInput, Budget, BudgetInfeasible, NotCalibrated, Runtime, UsageError
from mexit.runtime.stats import RuntimeStats


@pytest.fixture(scope="module")
def runtime(digits_bundle) -> Runtime:
    return Runtime.open(digits_bundle)


def test_ledger_equals_a_hand_count_of_predictions(mixed_bundle, test_digits) -> None:
    runtime = Runtime.open(mixed_bundle, "low")
    costs, static = runtime.bundle.manifest.cumulative_macs, runtime.bundle.manifest.static.macs
    low, full = runtime(list(test_digits[0])), runtime(list(test_digits[0][:50]), budget="full")
    predictions = low + full
    by_hand = sum(costs[found.exit - 1] for found in low) + 50 * static
    snapshot = runtime.stats.snapshot()
    assert snapshot.predictions == len(predictions) == 499
    assert snapshot.macs == by_hand == sum(found.macs for found in predictions)
    assert snapshot.macs + snapshot.saved_macs == 499 * static
    assert list(snapshot.exits) == [sum(found.exit == k for found in predictions) for k in (1, 2, 3)]
    assert sum(snapshot.exits[k] > 0 for k in range(3)) == 3


def test_every_kind_of_image_gives_the_same_answer(runtime, test_digits) -> None:
    grey = test_digits[0][0]
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    colour = np.repeat(grey[..., None], 3, axis=2)
    ready = (grey / np.float32(255)).astype(np.float32)[None, None]
    kinds = [grey, colour, colour[None], ready, buffer.getvalue(), [grey], [buffer.getvalue()]]
    answers = [runtime(kind)[0] for kind in kinds]
    assert len({(found.label, found.exit, found.confidence) for found in answers}) == 1


def test_prediction_says_what_was_spent(runtime, test_digits) -> None:
    found = runtime(test_digits[0][0], budget="high")[0]
    costs = runtime.bundle.manifest.cumulative_macs
    assert found.macs == costs[found.exit - 1]
    assert found.saved_macs == runtime.bundle.manifest.static.macs - found.macs
    assert found.confidence == pytest.approx(found.probabilities.max())
    assert found.probabilities.sum() == pytest.approx(1)
    assert found.budget == "high"
    assert found.label == str(found.index)
    assert found.latency_ms > 0
    assert found.to_json()["exit"] == found.exit


def test_lower_budgets_cost_less_on_average(runtime, test_digits) -> None:
    means = [
        np.mean([p.macs for p in runtime(list(test_digits[0]), budget=b)]) for b in ("low", "medium", "high", "full")
    ]
    assert means == sorted(means)
    assert means[0] < means[-1] / 2


def test_the_attribute_only_sets_the_default(digits_bundle, test_digits) -> None:
    runtime = Runtime.open(digits_bundle, "low")
    runtime.budget = "full"
    assert runtime.budget == Budget.parse("full")
    assert runtime(test_digits[0][0])[0].exit == 3
    assert runtime(test_digits[0][0], budget="low", max_exit=1)[0].exit == 1
    with pytest.raises(BudgetInfeasible):
        runtime.budget = "1%"
    assert runtime.budget == Budget.parse("full")


def test_budgets_between_frontier_points_take_the_one_below(runtime) -> None:
    entry = runtime.bundle.policies().entries[0]
    assert runtime.policy("38.0%") in [entry.policy(point) for point in entry.frontier]
    costs = runtime.bundle.manifest.cumulative_macs
    assert runtime.policy(f"{costs[0]}").thresholds == entry.frontier[0].thresholds


def test_infeasible_budget_names_the_nearest(runtime) -> None:
    with pytest.raises(BudgetInfeasible, match=str(runtime.bundle.manifest.cumulative_macs[0])):
        runtime.policy("3%")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((1, 1, 8, 8), np.float32) + 200, "0..255"),
        (np.zeros((1, 1, 8, 8), np.float32) - 0.5, "from -0.5"),
        (np.full((1, 1, 8, 8), np.nan, np.float32), "not finite"),
        (np.zeros((1, 3, 8, 8), np.float32), r"\(B, 1, 8, 8\)"),
        (np.zeros((1, 1, 8, 8), np.float64), "float64"),
        (np.zeros((8, 8), np.int64), "int64"),
        (np.zeros((2, 2, 8, 8, 3), np.uint8), r"\(2, 2, 8, 8, 3\)"),
        (b"not an image at all", "not an image"),
        ([None], "NoneType"),
    ],
    ids=["0..255", "negative", "nan", "channels", "float64", "int64", "five axes", "bytes", "None"],
)
def test_what_is_no_image_is_refused_with_what_was_found(runtime, images, words) -> None:
    with pytest.raises(BadInput, match=words):
        runtime(images)


def test_an_empty_batch_has_no_answers(runtime) -> None:
    assert runtime([]) == []
    assert runtime(np.zeros((0, 1, 8, 8), np.float32)) == []


def test_without_thresholds_only_full_works(bundle_copy, test_digits) -> None:
    (bundle_copy / "policies.json").unlink()
    with pytest.raises(NotCalibrated, match="mexit calibrate"):
        Runtime.open(bundle_copy, "low")
    runtime = Runtime.open(bundle_copy, "full")
    assert runtime(test_digits[0][0])[0].exit == 3
    with pytest.raises(NotCalibrated):
        runtime(test_digits[0][0], budget="low")


def test_misuse_is_refused(digits_bundle, runtime, test_digits) -> None:
    with pytest.raises(UsageError, match="auto, ort"):
        Runtime.open(digits_bundle, backend="tpu")
    with pytest.raises(UsageError, match="at least 1"):
        Runtime.open(digits_bundle, threads=0)
    with pytest.raises(UsageError, match="deadline_ms"):
        runtime(test_digits[0][0], deadline_ms=0)
    with pytest.raises(UsageError, match="low, medium"):
        runtime(test_digits[0][0], budget="cheap")


def test_deadline_in_the_past_answers_at_exit_1_and_says_so(runtime, test_digits) -> None:
    answers = runtime(list(test_digits[0][:100]), budget="full", deadline_ms=1e-6)
    assert {(found.exit, found.reason) for found in answers} == {(1, "deadline")}


def test_two_threads_share_a_runtime(digits_bundle, test_digits) -> None:
    runtime = Runtime.open(digits_bundle, "low")
    expected = [found.index for found in runtime(list(test_digits[0]))]
    found: dict[int, list[int]] = {}

    def work(place: int) -> None:
        found[place] = [answer.index for answer in runtime(list(test_digits[0]))]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(answers == expected for answers in found.values())
    assert runtime.stats.snapshot().predictions == 5 * len(expected)


def test_more_engine_threads_give_the_same_answers(digits_bundle, test_digits) -> None:
    one, two = (Runtime.open(digits_bundle, threads=threads)(list(test_digits[0])) for threads in (1, 2))
    assert [found.exit for found in one] == [found.exit for found in two]


def test_ledger_quantiles_are_within_their_bucket() -> None:
    stats = RuntimeStats(2, 2)
    assert stats.snapshot().latency_ms is None
    latencies = np.random.default_rng(0).lognormal(1, 1, 5000)
    for latency_ms in latencies.tolist():
        stats.add(1, latency_ms, 1)
    snapshot = stats.snapshot()
    assert snapshot.latency_ms is not None
    for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        assert snapshot.latency_ms[name] == pytest.approx(np.quantile(latencies, share), rel=0.07)
    assert snapshot.mean_macs == 1
    assert snapshot.saved == 0.5


def test_a_run_to_an_exit_evaluates_every_head_and_is_not_counted(digits_bundle) -> None:
    runtime = Runtime.open(digits_bundle, "full")
    costs = runtime.bundle.manifest.cumulative_macs
    assert [runtime.run_to_exit(k)[0].macs for k in (1, 2, 3)] == list(costs)
    assert runtime.stats.snapshot().predictions == 0
