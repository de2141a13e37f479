"""The adaptive engine answers as the slow reference does, on every sample; accounts are exact."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mexit import Runtime
from mexit.core.bundle import Bundle
from mexit.core.exit_policy import LOWEST, Policy
from mexit.core.scores import MEASURES
from mexit.errors import UsageError
from mexit.runtime.backends.fake import FakeBackend, images_for
from mexit.runtime.engine import answer
from mexit.runtime.reference import answer_slowly, run_all_exits

SHAPE = (1, 2, 2)


def backend(samples: int = 40, exits: int = 3, classes: int = 5, seed: int = 0) -> FakeBackend:
    rng = np.random.default_rng(seed)
    return FakeBackend((3 * rng.normal(size=(exits, samples, classes))).astype(np.float32))


def images(rows) -> np.ndarray:
    return images_for(np.asarray(rows), SHAPE)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("ensemble", [False, True], ids=["own", "ensemble"])
def test_engine_equals_reference_for_every_measure(measure, ensemble) -> None:
    fake = backend()
    scores = (
        Policy(measure, ensemble, (1.0, 2.0, 0.5), (None, None)).scorer(5).score(run_all_exits(fake, images(range(40))))
    )
    thresholds = tuple(float(np.median(row)) for row in scores[:2])
    policy = Policy(measure, ensemble, (1.0, 2.0, 0.5), thresholds)
    fast = answer(fake, images(range(40)), policy, 5)
    exits, probabilities, _ = answer_slowly(fake, images(range(40)), policy, 5)
    np.testing.assert_array_equal(fast.exits, exits)
    np.testing.assert_array_equal(fast.probabilities, probabilities)
    assert set(exits) == {1, 2, 3}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000),
    st.lists(st.one_of(st.none(), st.just(LOWEST), st.floats(-3, 3)), min_size=2, max_size=2),
    st.none() | st.lists(st.one_of(st.none(), st.floats(-3, 3)), min_size=3, max_size=3).map(tuple),
    st.lists(st.integers(0, 39), min_size=0, max_size=12),
    st.sampled_from([None, lambda _, rows: rows // 2]),
)
def test_any_batch_in_any_order_equals_the_reference(seed, thresholds, reject, rows, permit) -> None:
    fake = backend(seed=seed)
    policy = Policy("max-probability", False, (1.0,) * 3, tuple(thresholds), reject)
    fast = answer(fake, images(rows), policy, 5, permit=permit)
    exits, probabilities, unsure = answer_slowly(fake, images(rows), policy, 5, permit)
    np.testing.assert_array_equal(fast.exits, exits)
    assert fast.probabilities.tolist() == probabilities.tolist()
    assert (fast.unsure is None) == (reject is None)
    for row in range(len(rows) if permit is None else 0):
        alone = answer(fake, images(rows[row : row + 1]), policy, 5)
        assert reject is None or alone.unsure == [unsure[row]]
    assert ([False] * len(rows) if reject is None else fast.unsure) == unsure.tolist()


def test_dead_rows_are_not_computed() -> None:
    fake = backend()
    policy = Policy("max-probability", False, (1.0,) * 3, (0.5, 0.5))
    exits = np.array(answer(fake, images(range(40)), policy, 5).exits)
    assert [segment.rows_run for segment in fake.segments] == [40, (exits > 1).sum(), (exits > 2).sum()]


def test_nan_logits_walk_to_the_last_exit() -> None:
    fake = backend()
    fake.segments[0].logits[3] = np.nan
    fake.segments[1].logits[3, 2] = np.nan
    policy = Policy("max-probability", False, (1.0,) * 3, (float(np.finfo(np.float64).min),) * 2)
    answers = answer(fake, images([2, 3]), policy, 5)
    assert answers.exits == [1, 3]


def test_max_exit_and_deadline_answer_with_the_deepest_exit_so_far() -> None:
    never = Policy("max-probability", False, (1.0,) * 3, (None, None))
    assert answer(backend(), images([0, 1]), never, 5).reasons == ("last", "last")
    capped = answer(backend(), images([0, 1]), never, 5, max_exit=2)
    assert capped.exits == [2, 2]
    assert capped.reasons == ("max-exit", "max-exit")
    late = answer(backend(), images([0, 1]), never, 5, deadline_s=0.0)
    assert late.exits == [1, 1]
    assert late.reasons == ("deadline", "deadline")
    always = Policy("max-probability", False, (1.0,) * 3, (-1e9, None))
    assert answer(backend(), images([0]), always, 5, deadline_s=0.0).reasons == ("confident",)


@pytest.mark.parametrize("max_exit", [0, 4, -1])
def test_an_exit_that_does_not_exist_is_refused(max_exit) -> None:
    with pytest.raises(UsageError, match=r"1\.\.3"):
        answer(backend(), images([0]), Policy("margin", False, (1.0,) * 3, (None, None)), 5, max_exit=max_exit)


@pytest.mark.parametrize("budget", ["low", "medium", "high", "full", "40%"])
def test_bundle_answers_equal_the_reference_on_every_test_image(digits_bundle, test_digits, budget) -> None:
    runtime = Runtime.open(digits_bundle, budget)
    tensor = runtime.prepare(list(test_digits[0]))
    exits, probabilities, _ = answer_slowly(runtime.backend, tensor, runtime.policy(), 10)
    predictions = runtime(list(test_digits[0]))
    assert [found.exit for found in predictions] == exits.tolist()
    assert [found.index for found in predictions] == probabilities.argmax(axis=1).tolist()
    for found, expected in zip(predictions, probabilities, strict=True):
        np.testing.assert_allclose(found.probabilities, expected, rtol=0, atol=1e-6)


def test_never_leaving_equals_the_full_network(digits_bundle, test_digits) -> None:
    runtime = Runtime.open(digits_bundle, "full")
    predictions = runtime(list(test_digits[0]))
    logits = run_all_exits(runtime.backend, runtime.prepare(list(test_digits[0])))
    assert [found.index for found in predictions] == logits[-1].argmax(axis=1).tolist()
    assert {found.reason for found in predictions} == {"last"}


NEVER = Policy("max-probability", False, (1.0, 2.0, 0.5), (None, None))


def static_backend() -> FakeBackend:
    """`backend()` with a static network."""
    return FakeBackend(np.stack([segment.logits for segment in backend().segments]), static=True)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("reject", [None, (0.0, 0.0, 1.0)], ids=["answers", "reject option"])
def test_a_policy_without_early_exit_runs_the_static_network(rows, reject) -> None:
    policy = dataclasses.replace(NEVER, reject=reject)
    fake, asked = static_backend(), images(range(rows))
    answers = answer(fake, asked, policy, 5)
    chain = answer(backend(), asked, policy, 5)
    assert (answers.static, chain.static) == (True, False)
    assert fake.static.rows_run == rows
    assert [segment.rows_run for segment in fake.segments] == [0, 0, 0]
    assert answers.exits == [3] * rows
    assert answers.reasons == ("last",) * rows
    assert len(answers.segment_seconds) == 1
    np.testing.assert_array_equal(answers.probabilities, chain.probabilities)
    assert (answers.unsure is None) == (reject is None)
    assert reject is None or answers.unsure == chain.unsure


@pytest.mark.parametrize("builds", [{"ensemble": True}, {"measure": "agreement"}], ids=str)
def test_the_static_network_answers_with_the_last_exit_alone_unless_a_reject_score_needs_more(builds) -> None:
    policy, asked = dataclasses.replace(NEVER, **builds), images(range(40))
    answers = answer(static_backend(), asked, policy, 5)
    assert answers.static
    np.testing.assert_array_equal(answers.probabilities, answer(backend(), asked, NEVER, 5).probabilities)
    rejecting = dataclasses.replace(policy, reject=(0.0, 0.0, 0.0))
    assert not answer(static_backend(), asked, rejecting, 5).static


@pytest.mark.parametrize(
    "options",
    [{"deadline_s": 100.0}, {"permit": lambda _, rows: rows}, {"max_exit": 2}],
    ids=["deadline", "rate-limit", "max-exit"],
)
def test_the_segments_run_where_another_exit_may_have_to_answer(options) -> None:
    fake = static_backend()
    answers = answer(fake, images(range(40)), NEVER, 5, **options)
    assert not answers.static
    assert fake.static.rows_run == 0
    assert answer(fake, images(range(40)), NEVER, 5, max_exit=3).static
    assert not answer(fake, images(range(40)), dataclasses.replace(NEVER, thresholds=(None, 0.5)), 5).static


def test_predictions_receipts_and_statistics_count_the_static_network(mixed_bundle, test_digits) -> None:
    runtime = Runtime.open(mixed_bundle, "full")
    manifest = runtime.bundle.manifest
    full, static = manifest.cumulative_macs[-1], manifest.static.macs
    assert static == full - sum(spec.head_macs for spec in manifest.exits) < full
    found = runtime(list(test_digits[0][:3]), receipts=True)
    chain = runtime(list(test_digits[0][:3]), receipts=True, deadline_ms=60_000)
    for plain, whole in zip(found, chain, strict=True):
        np.testing.assert_allclose(plain.probabilities, whole.probabilities, atol=1e-6)
        assert (plain.exit, plain.reason, len(plain.receipt.segment_us)) == (3, "last", 1)
        assert len(whole.receipt.segment_us) == 3
        assert (plain.macs, plain.receipt_json()["macs"], whole.macs) == (static, static, full)
        assert (plain.saved_macs, whole.saved_macs) == (0, static - full)
    snapshot = runtime.stats.snapshot()
    assert snapshot.macs == 3 * (full + static)
    assert snapshot.saved_macs == 3 * (static - full)
    assert snapshot.saved == (static - full) / (2 * static)


def test_exits_have_the_numbers_of_the_network(digits_bundle, tmp_path, test_digits) -> None:
    """A bundle whose three segments are the exits 2, 3 and 5 of a network."""
    bundle = Bundle.open(digits_bundle)
    exits = [dataclasses.replace(one, number=k) for one, k in zip(bundle.manifest.exits, (2, 3, 5), strict=True)]
    manifest = dataclasses.replace(bundle.manifest, exits=tuple(exits))
    Bundle.from_parts(
        tmp_path / "kept", manifest, {one.file: bundle.content(one.file) for one in manifest.files}
    ).write()
    runtime = Runtime.open(tmp_path / "kept", "full", use_policies=False)
    image = test_digits[0][:1]
    found = {k: runtime(list(image), max_exit=k)[0] for k in (2, 3, 4, 5)}
    assert {k: one.exit for k, one in found.items()} == {2: 2, 3: 3, 4: 3, 5: 5}
    assert {k: one.reason for k, one in found.items()} == {2: "max-exit", 3: "max-exit", 4: "max-exit", 5: "last"}
    assert runtime.stats.snapshot().exits == (1, 2, 1)
    for k in (0, 1, 6):
        with pytest.raises(UsageError, match=rf"max_exit must lie in 2\.\.5, found {k}"):
            runtime(list(image), max_exit=k)
    assert [one.exit for one in (runtime.run_to_exit(k)[0] for k in (1, 2, 3))] == [2, 3, 5]
