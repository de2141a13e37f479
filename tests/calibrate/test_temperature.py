"""Temperatures recover the true class probabilities and lower the calibration error."""

from __future__ import annotations

import numpy as np
import pytest

from mexit.calibrate.temperature import HIGHEST, LOWEST, expected_calibration_error, fit_temperatures, reliability
from mexit.core.scores import Scorer


def sampled(temperature: float, samples: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax at `temperature` is the true distribution of the labels."""
    rng = np.random.default_rng(seed)
    logits = (3 * rng.normal(size=(samples, 5))).astype(np.float32)
    weights = np.exp(logits / temperature)
    weights /= weights.sum(axis=1, keepdims=True)
    labels = (weights.cumsum(axis=1) < rng.random((samples, 1))).sum(axis=1)
    return logits, labels


@pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
def test_the_true_temperature_is_fitted(true) -> None:
    logits, labels = sampled(true)
    (fitted,) = fit_temperatures(logits[None], labels)
    assert fitted == pytest.approx(true, rel=0.05)


def test_temperature_lowers_the_calibration_error() -> None:
    logits, labels = sampled(2.5)

    def error(temperature: float) -> float:
        weights = np.exp(logits / temperature - (logits / temperature).max(axis=1, keepdims=True))
        probabilities = weights / weights.sum(axis=1, keepdims=True)
        return expected_calibration_error(probabilities.max(axis=1), logits.argmax(axis=1) == labels)

    assert error(fit_temperatures(logits[None], labels)[0]) < 0.02 < error(1.0)


def test_temperatures_stay_in_bounds_and_ignore_nan() -> None:
    logits, _ = sampled(1.0, 50)
    assert fit_temperatures(logits[None], logits.argmax(axis=1))[0] == pytest.approx(LOWEST)
    assert fit_temperatures(logits[None], logits.argmin(axis=1))[0] == pytest.approx(HIGHEST)
    logits, labels = sampled(1.0)
    broken = logits.copy()
    broken[:100, 2] = np.nan
    assert fit_temperatures(broken[None], labels)[0] == pytest.approx(
        fit_temperatures(logits[None, 100:], labels[100:])[0]
    )
    assert fit_temperatures(np.full((1, 3, 4), np.nan, np.float32), np.zeros(3, np.int64)) == (1.0,)


def test_the_report_of_reliability_counts_every_sample_and_shows_the_gain_of_temperatures() -> None:
    logits, labels = sampled(2.5, 4000)
    both = np.stack([logits, logits])
    rows = reliability(Scorer("max-probability", False, (2.5, 1.0), 5), both, labels)
    assert [row["exit"] for row in rows] == [1, 2]
    assert all(sum(part["n"] for part in row[bins]) == 4000 for row in rows for bins in ("bins", "bins_before"))
    assert rows[0]["ece"] < 0.03 < rows[0]["ece_before"]
    assert rows[1]["ece"] == rows[1]["ece_before"]
    assert rows[1]["bins"] == rows[1]["bins_before"] == rows[0]["bins_before"] != rows[0]["bins"]
    assert reliability(Scorer("max-probability", False, (1.0, 1.0), 5), both, None) == []
