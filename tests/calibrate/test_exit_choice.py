"""The choice of exits: what saves time is kept, what does not is dropped with a reason, and noise chooses nothing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from mexit.calibrate.exit_choice import (
    MEASURABLE,
    ExitSearch,
    SegmentTimes,
    chain_subsets,
    choose_exits,
    shortlist,
)
from mexit.core.trace import Origin, Trace
from mexit.errors import BadInput

ORIGIN = Origin("m", "fp32", "ort", "fp32", "calibration", "clean", "d")
CLASSES = 5


def trace(quality: list[float], n: int = 1500, seed: int = 0, groups: int | None = None) -> Trace:
    """Logits whose exit k classifies about `quality[k]` of the samples correctly, with a useful confidence."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    difficulty = rng.uniform(0, 1, n)
    logits = np.zeros((len(quality), n, CLASSES), np.float32)
    for k, share in enumerate(quality):
        margin = 6 * (share - difficulty) + rng.normal(0, 0.3, n)
        logits[k] = rng.normal(0, 0.1, (n, CLASSES))
        np.put_along_axis(logits[k], labels[:, None], np.maximum(margin, 0.2)[:, None].astype(np.float32), 1)
        wrong = (labels + 1 + rng.integers(0, CLASSES - 1, n)) % CLASSES
        rows = np.flatnonzero(margin < 0)
        logits[k, rows, labels[rows]], logits[k, rows, wrong[rows]] = 0, 0.2
    ids = None if groups is None else rng.integers(0, groups, n)
    return Trace(logits, labels, np.arange(n), ORIGIN, ids)


def times(trunk_us: list[float], head_us: float, cut_us: float) -> SegmentTimes:
    """Exact times: the trunk between two exits, one head, and the cost of a cut."""
    reach = np.cumsum([0, *trunk_us])
    last = len(trunk_us)
    us = {
        (i, j): float(reach[j] - reach[i] + head_us + (cut_us if i else 0))
        for j in range(1, last + 1)
        for i in range(j)
    }
    return SegmentTimes(us, us[0, last])


def search(quality: list[float], measured: SegmentTimes, **options) -> ExitSearch:
    return ExitSearch([trace(quality, seed=1, **options), trace(quality, seed=2, **options)], measured)


def test_an_exit_that_answers_most_samples_early_is_kept_and_saves_the_stated_time() -> None:
    measured = times([100, 100, 100, 700], 5, 5)
    choice = choose_exits(search([0.0, 0.02, 0.9, 0.92], measured))
    assert choice.kept == (3, 4)
    assert choice.mean_us < 0.6 * choice.static_us
    assert choice.loss <= 0.005 + choice.loss_error
    assert set(choice.dropped) == {1, 2}
    assert choice.n == 3000
    assert measured.leaving((3, 4)) == (305.0, 305.0 + 710.0)


def test_exits_that_cost_more_than_they_save_are_dropped() -> None:
    choice = choose_exits(search([0.5, 0.7, 0.8, 0.9], times([10, 10, 10, 10], 30, 60)))
    assert choice.kept == (4,)
    assert choice.mean_us == choice.static_us == 70
    assert choice.loss == 0
    assert all("without it 70 us" in why or "too much accuracy" in why for why in choice.dropped.values())


def test_useless_exits_are_dropped() -> None:
    """Exits that guess cannot answer anything at the static network's accuracy."""
    assert choose_exits(search([0.0, 0.0, 0.9], times([300, 300, 300], 1, 1))).kept == (3,)


def test_of_equal_subsets_the_smallest_is_chosen() -> None:
    """Exits 1 and 2 give the same logits at nearly the same time, so the second one brings nothing."""
    parts = [trace([0.85, 0.85, 0.92], seed=seed) for seed in (1, 2)]
    for part in parts:
        part.logits[1] = part.logits[0]
    choice = choose_exits(ExitSearch(parts, times([200, 0.5, 700], 0, 0)))
    assert choice.kept == (1, 3)
    assert choice.dropped[2].startswith("it saves no clear time")


def test_an_exit_of_equal_accuracy_may_answer_everything() -> None:
    choice = choose_exits(search([0.2, 0.9, 0.9], times([100, 100, 800], 5, 5)))
    assert choice.kept == (2, 3)
    assert choice.mean_us == pytest.approx(205, rel=0.1)


def test_the_choice_depends_on_the_times_not_on_the_macs() -> None:
    quality = [0.75, 0.82, 0.9, 0.92]
    early_is_cheap = choose_exits(search(quality, times([50, 300, 300, 300], 5, 5)))
    early_is_dear = choose_exits(search(quality, times([950, 5, 5, 5], 5, 5)))
    assert 1 in early_is_cheap.kept
    assert early_is_dear.kept == (4,)


def test_many_candidates_are_shortened_by_estimated_times_before_the_segments_are_measured() -> None:
    exits = 12
    quality = [*np.linspace(0.1, 0.9, exits - 1).tolist(), 0.92]
    prefixes = (100 * np.arange(1, exits + 1)).tolist()
    estimated = SegmentTimes.from_prefixes(prefixes, 5.0)
    assert estimated.leaving((3, 9, 12)) == (300, 905, 1210)
    short = shortlist(search(quality, estimated, n=300))
    assert len(short) == MEASURABLE
    assert short[-1] == exits
    assert all(a < b for a, b in pairwise(short))
    assert any(k >= 8 for k in short[:-1])
    choice = choose_exits(search(quality, estimated, n=300), short)
    assert set(choice.kept) <= set(short)
    assert len(choice.kept) <= 4
    assert set(choice.dropped) == set(range(1, exits)) - set(choice.kept)


def test_groups_widen_the_errors() -> None:
    measured = times([100, 700], 5, 5)
    alone = choose_exits(search([0.85, 0.92], measured))
    grouped = choose_exits(search([0.85, 0.92], measured, groups=12))
    assert alone.kept == grouped.kept == (1, 2)
    assert grouped.loss_error != alone.loss_error


def test_subsets() -> None:
    assert chain_subsets((1, 2, 3), 2) == [(), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3)]


def test_too_little_data_is_an_error() -> None:
    part = trace([0.5, 0.9], n=30)
    with pytest.raises(BadInput, match=r"at least 50 samples are needed, found \[30, 30\]"):
        ExitSearch([part, part], times([1, 1], 1, 1))
