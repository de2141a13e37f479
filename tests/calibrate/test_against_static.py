"""Paired comparison of a policy with the static network on a trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mexit.calibrate.against_static import compare_with_static
from mexit.core.cost import Costs
from mexit.core.exit_policy import Policy
from mexit.core.trace import Origin, Trace

N, CLASSES = 300, 5
COSTS = Costs((10, 30))
EARLY = Policy("max-probability", False, (1.0, 1.0), (0.5,))


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Two exits; the first is right less often."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, N)
    logits = rng.normal(0, 1, (2, N, CLASSES)).astype(np.float32)
    for k, strength in enumerate((1.0, 2.0)):
        logits[k, np.arange(N), labels] += strength
    origin = Origin("0" * 64, "fp32", "ort", "fp32", "certification", "clean", "")
    return Trace(logits, labels, np.arange(N), origin)


def right_answers(trace: Trace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which samples leave early, and which are right under `EARLY` and in the static network, (N,) each."""
    early = EARLY.scorer(CLASSES).score(trace.logits)[0] >= 0.5
    right = trace.logits.argmax(axis=2) == trace.labels
    return early, np.where(early, right[0], right[1]), right[1]


def test_the_difference_is_paired(trace: Trace) -> None:
    early, adaptive, static = right_answers(trace)
    found = compare_with_static(trace, EARLY, COSTS)
    change = adaptive.astype(float) - static
    assert set(change) == {-1.0, 0.0, 1.0}, "the case has answers that get better and worse"
    assert (found.n, found.accuracy_change.value) == (N, pytest.approx(change.mean()))
    assert found.accuracy_change.stderr == pytest.approx(change.std(ddof=1) / N**0.5)
    assert found.accuracy_change.stderr < np.hypot(adaptive.std(), static.std()) / N**0.5, "unpaired"
    assert found.cost.value == pytest.approx(np.where(early, 10, 30).mean())


def test_groups_count_as_one_sample_each(trace: Trace) -> None:
    """Ten copies of each sample in one group have the error of the samples."""
    copies = replace(
        trace, logits=np.repeat(trace.logits, 10, axis=1), labels=np.repeat(trace.labels, 10),
        index=np.arange(10 * N), groups=np.repeat(np.arange(N), 10),
    )  # fmt: skip
    one, many = compare_with_static(trace, EARLY, COSTS), compare_with_static(copies, EARLY, COSTS)
    assert many.accuracy_change.value == pytest.approx(one.accuracy_change.value)
    assert many.accuracy_change.stderr == pytest.approx(one.accuracy_change.stderr)


def test_a_policy_without_thresholds_is_the_static_network(trace: Trace) -> None:
    """Also with the score of an ensemble, whose answer would differ from the last exit's."""
    for ensemble in (False, True):
        found = compare_with_static(trace, replace(EARLY, thresholds=(None,), ensemble=ensemble), COSTS)
        assert (found.accuracy_change.value, found.accuracy_change.stderr, found.cost.value) == (0, 0, 30)


def test_without_labels_only_the_cost_is_known(trace: Trace) -> None:
    found = compare_with_static(replace(trace, labels=None), EARLY, COSTS)
    assert found.accuracy_change is None
    assert 10 < found.cost.value < 30
