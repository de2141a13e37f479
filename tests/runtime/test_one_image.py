"""The path of a single image: answers equal those of the reference and of a batch, to the last bit, in any thread."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mexit.core.bundle import Bundle
from mexit.core.exit_policy import Policy
from mexit.core.scores import MEASURES
from mexit.errors import BackendError
from mexit.runtime.backends.base import Backend
from mexit.runtime.backends.bound_runner import Runner, RunnerPool
from mexit.runtime.backends.fake import FakeBackend, images_for
from mexit.runtime.backends.ort import OrtBackend
from mexit.runtime.backends.registry import open_backend
from mexit.runtime.engine import Answers, answer
from mexit.runtime.reference import answer_slowly, run_all_exits


@pytest.fixture(scope="module", params=["ort", "openvino", "openvino:bf16"])
def backend(digits_bundle, request) -> Backend:
    if request.param != "ort":
        pytest.importorskip("openvino")
    try:
        return open_backend(Bundle.open(digits_bundle), request.param)
    except BackendError as error:  # no bfloat16 on this processor
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def images(test_digits) -> np.ndarray:
    return (test_digits[0][:, None] / np.float32(255)).astype(np.float32)


def mixed(backend: Backend, images: np.ndarray, measure: str, ensemble: bool) -> Policy:
    """A policy with which about a third of the images leaves at each exit."""
    policy = Policy(measure, ensemble, (1.3, 0.8, 1.0), (None, None))
    scores = policy.scorer(10).score(run_all_exits(backend, images))
    first = float(np.quantile(scores[0], 0.66))
    return Policy(measure, ensemble, policy.temperatures, (first, float(np.median(scores[1][scores[0] < first]))))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("ensemble", [False, True], ids=["own", "ensemble"])
def test_each_test_image_alone_equals_the_reference_and_the_batch_to_the_last_bit(
    backend, images, measure, ensemble
) -> None:
    policy = mixed(backend, images, measure, ensemble)
    scores = policy.scorer(10).score(run_all_exits(backend, images))
    policy = replace(policy, reject=tuple(float(np.quantile(row, 0.2)) for row in scores))
    exits, probabilities, unsure = answer_slowly(backend, images, policy, 10)
    assert set(exits) == {1, 2, 3}
    assert 0 < unsure.sum() < (exits == 3).sum()
    together = answer(backend, images, policy, 10)
    for row in range(len(images)):
        alone = answer(backend, images[row : row + 1], policy, 10)
        assert alone.exits == [exits[row]] == [together.exits[row]]
        assert alone.probabilities.tobytes() == probabilities[row].tobytes()
        assert alone.reasons == together.reasons[row : row + 1]
        assert alone.unsure == [unsure[row]] == [together.unsure[row]]
        assert len(alone.segment_seconds) == exits[row]
        assert sum(alone.segment_seconds) == pytest.approx(alone.seconds[0])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.floats(-3, 3)), min_size=2, max_size=2),
    st.integers(0, 39),
    st.one_of(st.none(), st.integers(1, 3)),
    st.sampled_from([None, 0.0, 1e9]),
    st.one_of(st.none(), st.lists(st.booleans(), min_size=3, max_size=3)),
)
def test_caps_deadlines_and_tokens_do_what_they_do_to_batches(thresholds, row, max_exit, deadline_s, tokens) -> None:
    rng = np.random.default_rng(0)
    fake = FakeBackend((3 * rng.normal(size=(3, 40, 5))).astype(np.float32))
    policy = Policy("margin", False, (1.0,) * 3, tuple(thresholds))

    def answer_rows(count: int) -> tuple[Answers, list[int]]:
        asked: list[int] = []

        def permit(k: int, rows: int) -> int:
            asked.append(k)
            return rows * tokens[k - 2]

        images = images_for(np.array([row] * count), (1, 2, 2))
        options = {"max_exit": max_exit, "deadline_s": deadline_s, "permit": permit if tokens else None}
        return answer(fake, images, policy, 5, **options), asked

    (alone, asked_alone), (two, asked) = answer_rows(1), answer_rows(2)
    assert asked_alone == asked
    assert (alone.exits[0], alone.reasons[0]) == (two.exits[0], two.reasons[0])
    assert alone.probabilities[0].tobytes() == two.probabilities[0].tobytes()
    assert len(alone.segment_seconds) == len(two.segment_seconds)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("measure", MEASURES)
def test_an_image_forced_to_an_exit_is_unsure_by_the_threshold_of_that_exit(backend, images, measure, k) -> None:
    """Its score may have been estimated for the exit's own threshold before; `agreement` counts an exit only once."""
    policy = mixed(backend, images, measure, False)
    scores = policy.scorer(10).score(run_all_exits(backend, images))
    policy = replace(policy, reject=tuple(float(np.quantile(row, 0.4)) for row in scores))
    together = answer(backend, images, policy, 10, max_exit=k)
    at_k, unsure = np.array(together.exits) == k, np.array(together.unsure)
    confident = np.array([reason == "confident" for reason in together.reasons])
    expected = ~confident & (scores[k - 1] < policy.reject[k - 1])
    assert unsure[at_k].tolist() == expected[at_k].tolist()
    assert not unsure[~at_k].any()
    assert 0 < unsure.sum() < len(images)
    for row in range(0, len(images), 7):
        alone = answer(backend, images[row : row + 1], policy, 10, max_exit=k)
        assert alone.unsure == [unsure[row]]
        assert alone.probabilities.tobytes() == together.probabilities[row].tobytes()


def test_concurrent_calls_do_not_share_buffers(backend, images, monkeypatch) -> None:
    policy = mixed(backend, images, "max-probability", False)
    expected = answer_slowly(backend, images, policy, 10)
    start = threading.Barrier(4)
    made: list[Runner] = []
    new_runner = backend.runners.take  # the pool makes a runner for every call if none is given back

    def make() -> Runner:
        made.append(new_runner())
        return made[-1]

    monkeypatch.setattr(backend, "runners", RunnerPool(make))

    def run_images(seed: int) -> bool:
        start.wait()
        for row in np.random.default_rng(seed).integers(0, len(images), 400):
            found = answer(backend, images[row : row + 1], policy, 10)
            if found.exits[0] != expected[0][row] or (found.probabilities[0] != expected[1][row]).any():
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run_images, range(4)))
    assert 1 <= len(made) <= 4, "runners are used again, not made for each call"


def test_features_and_answers_of_earlier_images_do_not_change(backend, images) -> None:
    never = Policy("max-probability", False, (1.0,) * 3, (None, None))
    held, logits = backend.segments[0].run(backend.carry(images[:1]))
    first = answer(backend, images[:1], never, 10)
    before = [array.copy() for array in (*held.arrays, logits, first.probabilities)]
    for row in range(1, 30):
        answer(backend, images[row : row + 1], never, 10)
        backend.segments[0].run(backend.carry(images[row : row + 1]))
    for array, copy in zip((*held.arrays, logits, first.probabilities), before, strict=True):
        np.testing.assert_array_equal(array, copy)
    merged = held.concat([backend.segments[0].run(backend.carry(images[1:3]))[0]])
    np.testing.assert_array_equal(backend.segments[1].run(merged)[1], run_all_exits(backend, images[:3])[1])


def test_a_runner_that_failed_is_not_used_again(digits_bundle, images) -> None:
    backend = OrtBackend(Bundle.open(digits_bundle))
    never = Policy("max-probability", False, (1.0,) * 3, (None, None))
    expected = answer(backend, images[:1], never, 10).probabilities
    runner = backend.static_runners.take()
    backend.static_runners.give_back(runner)
    with pytest.raises(BackendError, match=r"given an image \(1, 1, 1, 1\), expected \(1, 1, 8, 8\)"):
        answer(backend, images[:1, :, :1, :1], never, 10)
    assert backend.static_runners.take() is not runner
    assert answer(backend, images[:1], never, 10).probabilities.tobytes() == expected.tobytes()


def test_images_that_are_not_contiguous_are_answered(backend, images) -> None:
    never = Policy("max-probability", False, (1.0,) * 3, (None, None))
    turned = images[:1].transpose(0, 1, 3, 2)
    found = answer(backend, turned, never, 10)
    assert found.probabilities.tobytes() == answer(backend, turned.copy(), never, 10).probabilities.tobytes()
