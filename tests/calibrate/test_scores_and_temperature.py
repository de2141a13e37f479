"""Temperatures that calibrate, and scores that rank."""

from __future__ import annotations

import numpy as np
import pytest

from mexit.calibrate.score_selection import ScoreQuality, auroc, choose, rank_scores
from mexit.calibrate.temperature import HIGHEST, LOWEST, expected_calibration_error, fit
from mexit.core.trace import Origin, Trace

ORIGIN = Origin("m", "fp32", "ort", "fp32", "calibration", "clean", "d")


def sampled(temperature: float, samples: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax at `temperature` is the true distribution of the labels."""
    rng = np.random.default_rng(seed)
    logits = (3 * rng.normal(size=(samples, 5))).astype(np.float32)
    weights = np.exp(logits / temperature)
    weights /= weights.sum(axis=1, keepdims=True)
    labels = (weights.cumsum(axis=1) < rng.random((samples, 1))).sum(axis=1)
    return logits, labels


@pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
def test_the_true_temperature_is_found(true) -> None:
    logits, labels = sampled(true)
    (found,) = fit(logits[None], labels)
    assert found == pytest.approx(true, rel=0.05)


def test_temperature_lowers_the_calibration_error() -> None:
    logits, labels = sampled(2.5)

    def error(temperature: float) -> float:
        weights = np.exp(logits / temperature - (logits / temperature).max(axis=1, keepdims=True))
        probabilities = weights / weights.sum(axis=1, keepdims=True)
        return expected_calibration_error(probabilities.max(axis=1), logits.argmax(axis=1) == labels)

    assert error(fit(logits[None], labels)[0]) < 0.02 < error(1.0)


def test_temperatures_stay_in_bounds_and_ignore_nan() -> None:
    logits, _ = sampled(1.0, 50)
    assert fit(logits[None], logits.argmax(axis=1))[0] == pytest.approx(LOWEST)
    assert fit(logits[None], logits.argmin(axis=1))[0] == pytest.approx(HIGHEST)
    logits, labels = sampled(1.0)
    broken = logits.copy()
    broken[:100, 2] = np.nan
    assert fit(broken[None], labels)[0] == pytest.approx(fit(logits[None, 100:], labels[100:])[0])
    assert fit(np.full((1, 3, 4), np.nan, np.float32), np.zeros(3, np.int64)) == (1.0,)


def test_auroc_by_hand_and_by_counting_pairs() -> None:
    assert auroc(np.array([3.0, 2.0, 1.0]), np.array([True, True, False])) == 1
    assert auroc(np.array([1.0, 1.0]), np.array([True, False])) == 0.5
    assert np.isnan(auroc(np.array([1.0, 2.0]), np.array([True, True])))
    rng = np.random.default_rng(0)
    scores, right = np.round(rng.normal(size=60), 1), rng.random(60) < 0.7
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[right] for b in scores[~right]]
    assert auroc(scores, right) == pytest.approx(np.mean(pairs))


def test_the_simplest_score_wins_unless_another_is_clearly_better() -> None:
    plain = ScoreQuality("max-probability", False, (0.9,))
    assert choose([plain, ScoreQuality("margin", False, (0.901,))]) == plain
    better = ScoreQuality("margin", False, (0.95,))
    assert choose([plain, better]) == better
    nothing = ScoreQuality("max-probability", False, (float("nan"),))
    assert choose([nothing, ScoreQuality("margin", False, (float("nan"),))]) == nothing


def test_every_score_is_ranked_on_every_trace() -> None:
    logits, labels = sampled(1.0, 500)
    traces = [Trace(np.stack([logits, logits]), labels, np.arange(500), ORIGIN)] * 2
    found = rank_scores(traces, (1.0, 1.0))
    assert len(found) == 8
    assert all(len(one.auroc) == 2 and 0.5 < one.mean < 1 for one in found)
