"""AUROC of the confidence scores, and the selection among them."""

from __future__ import annotations

import numpy as np
import pytest

from mexit.calibrate.score_selection import ScoreQuality, auroc, rank_scores, select_score
from mexit.core.trace import Origin, Trace

ORIGIN = Origin("m", "fp32", "ort", "fp32", "calibration", "clean", "d")


def test_auroc_by_hand_and_by_counting_pairs() -> None:
    assert auroc(np.array([3.0, 2.0, 1.0]), np.array([True, True, False])) == 1
    assert auroc(np.array([1.0, 1.0]), np.array([True, False])) == 0.5
    assert np.isnan(auroc(np.array([1.0, 2.0]), np.array([True, True])))
    rng = np.random.default_rng(0)
    scores, correct = np.round(rng.normal(size=60), 1), rng.random(60) < 0.7
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[correct] for b in scores[~correct]]
    assert auroc(scores, correct) == pytest.approx(np.mean(pairs))


def test_the_simplest_score_is_selected_unless_another_is_clearly_better() -> None:
    plain = ScoreQuality("max-probability", False, (0.9,))
    assert select_score([plain, ScoreQuality("margin", False, (0.901,))]) == plain
    better = ScoreQuality("margin", False, (0.95,))
    assert select_score([plain, better]) == better
    nothing = ScoreQuality("max-probability", False, (float("nan"),))
    assert select_score([nothing, ScoreQuality("margin", False, (float("nan"),))]) == nothing


def test_every_score_is_ranked_on_every_trace() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 500)
    logits = rng.normal(size=(500, 5)).astype(np.float32)
    logits[np.arange(500), labels] += 1.5
    traces = [Trace(np.stack([logits, logits]), labels, np.arange(500), ORIGIN)] * 2
    qualities = rank_scores(traces, (1.0, 1.0))
    assert len(qualities) == 8
    assert all(len(one.auroc) == 2 and 0.5 < one.mean < 1 for one in qualities)
