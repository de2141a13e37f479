"""Answers of a policy: as the deployed policy decides, and which of them a contact sheet shows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mexit.attacks.soft_policy import decide
from mexit.core.exit_policy import Policy
from mexit.evaluate.answers import NO_ANSWER, Answers, ScoredExits


def answers(predicted: list[int], confidence: list[float], groups: list[int] | None = None) -> Answers:
    n = len(predicted)
    return Answers(
        "exit 2",
        np.arange(n),
        np.zeros(n, np.int64),
        np.array(predicted),
        np.array(confidence),
        np.full(n, 2),
        None if groups is None else np.array(groups),
    )


@pytest.mark.parametrize("measure", ["max-probability", "margin", "entropy", "agreement"])
@pytest.mark.parametrize("ensemble", [False, True])
def test_answers_are_those_of_the_policy(measure: str, ensemble: bool) -> None:
    rng = np.random.default_rng(1)
    logits = (3 * rng.normal(size=(3, 80, 5))).astype(np.float32)
    logits[:, 7] = np.nan
    policy = Policy(measure, ensemble, (2.0, 1.0, 1.5), (1.0, None))
    labels = rng.integers(0, 5, 80)
    scored = ScoredExits.of(policy, logits)
    found, expected = scored.answers("budget low", policy, labels, np.arange(80)), decide(policy, logits)
    np.testing.assert_array_equal(found.predicted, expected.classes)
    np.testing.assert_array_equal(found.exits, expected.exits)
    np.testing.assert_array_equal(found.correct, expected.classes == labels)
    np.testing.assert_array_equal(scored.correct(policy, labels), found.correct)
    assert found.predicted[7] == NO_ANSWER
    assert found.confidence[7] == 0
    assert ((found.confidence > 0.2) & (found.confidence <= 1))[np.arange(80) != 7].all()


def test_the_most_wrong_are_wrong_answers_with_the_highest_confidence() -> None:
    found = answers([0, 1, 1, 2, NO_ANSWER], [0.9, 0.5, 0.8, 0.8, 0.95])
    assert found.most_wrong(9).tolist() == [2, 3, 1]
    assert found.most_wrong(1).tolist() == [2]
    assert answers([0, 0], [0.1, 0.2]).most_wrong(3).tolist() == []


def test_the_least_certain_may_be_right_and_come_once_for_each_group() -> None:
    assert answers([0, 1, 0], [0.9, 0.5, 0.2]).least_certain(2).tolist() == [2, 1]
    assert answers([1, 1, 1, 1], [0.9, 0.4, 0.3, 0.5], [4, 4, 4, 2]).least_certain(4).tolist() == [2, 3]
    assert answers([1, 1, 1, 1], [0.9, 0.4, 0.3, 0.5], [4, 4, 4, 2]).most_wrong(4).tolist() == [0, 3]


def test_an_unsure_answer_is_none_and_never_among_the_wrong_ones() -> None:
    rng = np.random.default_rng(2)
    logits, labels = (2 * rng.normal(size=(2, 60, 3))).astype(np.float32), rng.integers(0, 3, 60)
    policy = Policy("max-probability", False, (1.0, 1.0), (1.5,))
    scored = ScoredExits.of(policy, logits)
    withheld = replace(policy, reject=(None, 0.5))
    before, after = (scored.answers("x", one, labels, np.arange(60)) for one in (policy, withheld))
    unsure = (before.exits == 2) & (scored.scores[1] < 0.5)
    assert 0 < unsure.sum() < 60
    np.testing.assert_array_equal(after.answered, ~unsure)
    np.testing.assert_array_equal(after.predicted, np.where(unsure, NO_ANSWER, before.predicted))
    np.testing.assert_array_equal(scored.correct(withheld, labels), before.correct & ~unsure)
    assert not unsure[after.most_wrong(60)].any()
