"""The steady label: votes, hysteresis and the stated delay."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mexit.camera.steady import SteadySettings
from mexit.camera.votes import Votes
from mexit.errors import UsageError


def steady_labels(votes: Votes, labels: str, confidence: float = 0.9) -> str:
    """The steady label after each answer, as letters; `-` is none. In `labels`, `-` is an unsure answer."""
    given = [None if letter == "-" else letter for letter in labels]
    return "".join(votes.update(label, confidence) or "-" for label in given)


def test_without_votes_the_steady_label_is_that_of_the_answer() -> None:
    votes = Votes()
    assert steady_labels(votes, "ABA-B") == "ABA-B"
    assert votes.delay_frames == 0


@pytest.mark.parametrize(("window", "hold"), list(itertools.product((1, 2, 3, 5, 8), (1, 2, 4))))
def test_a_clean_change_is_seen_within_the_stated_delay(window: int, hold: int) -> None:
    """Whatever came before, and whatever the confidences are; the bound is reached."""
    rng, delays = np.random.default_rng(0), []
    for trial in range(200):
        votes = Votes(window, hold)
        for _ in range(rng.integers(0, 20)):
            votes.update(str(rng.choice(["A", "C"])), rng.uniform(0.1, 1))
        if trial == 0:
            [votes.update("A", 1.0) for _ in range(window + hold)]
        weak = 1e-3 if trial == 0 else rng.uniform(0.01, 1)
        delay = next(n for n in itertools.count() if votes.update("B", weak * rng.uniform(0.5, 1)) == "B")
        delays.append(delay)
    assert max(delays) == votes.delay_frames == window + hold - 2


def test_answers_that_turn_unsure_leave_no_steady_label_within_the_stated_delay() -> None:
    votes = Votes(window=5, hold=3)
    steady_labels(votes, "AAAAAAAA")
    after = steady_labels(votes, "-" * 9)
    assert after.index("-") == votes.delay_frames == 6
    assert steady_labels(votes, "AAA") == "--A"


def test_single_wrong_answers_change_nothing() -> None:
    assert steady_labels(Votes(5, 1), "AAABAAABBAACAAA") == "A" * 15


def test_a_label_must_lead_for_hold_answers() -> None:
    assert steady_labels(Votes(3, 1), "AAABBAABBBBB") == "AAAABBAABBBB"
    assert steady_labels(Votes(3, 3), "AAABBAABBBBB") == "--AAAAAAAABB"


def test_confidence_is_the_weight_of_a_vote() -> None:
    def after(doubtful: float) -> str | None:
        votes = Votes(window=3, hold=1)
        votes.update("A", 0.95)
        votes.update("B", doubtful)
        return votes.update("B", doubtful)

    assert after(0.4) == "A"
    assert after(0.5) == "B"


def test_the_steady_label_wins_ties() -> None:
    assert steady_labels(Votes(window=4, hold=1), "AAAABBBCCDBB") == "AAAAAABBBBBB"


def test_one_sure_answer_among_unsure_ones_is_not_held() -> None:
    votes = Votes(window=5, hold=3)
    assert steady_labels(votes, "----A-----") == "-" * 10
    assert steady_labels(votes, "A-A-A") == "----A"


def test_settled_means_that_repeating_the_answer_changes_nothing() -> None:
    votes = Votes(window=3, hold=2)
    assert not votes.settled
    seen = []
    for label in "AAAABBBB":
        votes.update(label, 0.8)
        seen.append(votes.settled)
    assert seen == [False, True, True, True, False, False, True, True]
    assert steady_labels(votes, "B" * 10) == "B" * 10
    other = Votes(window=5, hold=3)
    assert steady_labels(other, "AAABBBA") == "--AAAAA"
    assert other.settled
    assert steady_labels(other, "A" * 10) == "A" * 10


@pytest.mark.parametrize(
    ("window", "hold", "message"),
    [
        (0, 1, "votes must be at least 1, found 0"),
        (3, 0, "hold must be at least 1, found 0"),
        (10**30, 1, "votes must be at most 10000"),
        (1, 10_001, "hold must be at most 10000, found 10001"),
    ],
)
def test_numbers_out_of_their_range_are_refused(window: int, hold: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Votes(window, hold)
    with pytest.raises(UsageError, match=message):
        SteadySettings(votes=window, hold=hold)
